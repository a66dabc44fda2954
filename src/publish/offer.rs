//! What consumers are given: the newest identity, encoded once for all of them.

use crate::{
    proto::{
        X509BundlesResponse, X509svid, X509svidResponse,
        envoy::{
            extensions::transport_sockets::tls::v3::{
                CertificateValidationContext, DataSource, Secret as EnvoySecret, TlsCertificate,
                data_source::Specifier, secret::Type,
            },
            service::secret::v3::{DeltaSecret, DeltaSecretResponse, SecretResponse},
        },
    },
    spiffe::{X509Bundle, X509Context, X509Svid},
    status::Identity,
};
use bytes::Bytes;
use prost::Message as _;
use rustls::pki_types::CertificateDer;
use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::SystemTime,
};
use tonic::Status;

/// The type of every secret.
pub(super) const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Offer {
    /// The newest that was valid when it came; none before the first.
    encoded: Option<Arc<Encoded>>,
    /// Why there will be none any more, if that is so.
    pub(super) refused: Option<Arc<str>>,
}

/// One identity, as each protocol says it. The key in it lasts until the last lets go ([`crate::host::Wiping`]).
pub(super) struct Encoded {
    context: Arc<X509Context>,
    /// The serial number of the certificate, which makes Envoy's `version_text` readable.
    pub(super) svid_version: Arc<str>,
    /// A hash of the roots.
    pub(super) roots_version: Arc<str>,
    secrets: [Secret; 2],
    /// An `X509SVIDResponse`.
    pub(super) svid: Bytes,
    /// An `X509BundlesResponse`.
    pub(super) bundles: Bytes,
}

/// One secret of Envoy's, as a response with nothing else in it.
pub(super) struct Secret {
    pub(super) name: Name,
    pub(super) version: Arc<str>,
    /// A [`SecretResponse`].
    pub(super) world: Bytes,
    /// A [`DeltaSecretResponse`].
    pub(super) delta: Bytes,
}

/// A name that is served; the words are those that istiod writes into Envoy's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Name {
    /// Certificate and key.
    Default,
    /// The roots to verify others by.
    RootCa,
}

impl Name {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::RootCa => "ROOTCA",
        }
    }

    /// Istio's own agent answers any name with the key; here only the two that mean this identity are known.
    pub(super) fn parse(name: &str) -> Result<Self, Status> {
        match name {
            "default" => Ok(Self::Default),
            "ROOTCA" => Ok(Self::RootCa),
            file if file.starts_with("file-root:") || file.starts_with("file-cert:") => {
                Err(Status::unimplemented(format!(
                    "{file:.128}: we-agent reads no files for Envoy; use the secrets default and ROOTCA, or let Envoy read the file itself (filename, or path_config_source)"
                )))
            }
            other => Err(Status::not_found(format!(
                "no secret {:?} here; there are default and ROOTCA",
                other.chars().take(128).collect::<String>()
            ))),
        }
    }
}

impl Offer {
    /// Takes in what is known of the identity at `now`; whether there is something else to be said. An SVID that is not
    /// valid changes nothing: those who have something keep it.
    pub(super) fn follow(&mut self, identity: &Identity, now: SystemTime) -> bool {
        let refused = identity
            .credentials_dead
            .then(|| identity.trouble.as_ref().map_or("the token is not accepted", |trouble| &trouble.cause).into());
        let mut news = self.refused != refused;
        self.refused = refused;
        if let Some(context) = identity.valid(now)
            && !self.encoded.as_ref().is_some_and(|encoded| Arc::ptr_eq(&encoded.context, context))
        {
            self.encoded = Some(Arc::new(Encoded::of(context)));
            news = true;
        }
        news
    }

    /// The serial number of what is offered.
    pub(super) fn serial(&self) -> Option<&str> {
        self.encoded.as_ref().map(|encoded| &*encoded.svid_version)
    }

    /// The identity, unless nobody should use it any more at `now`.
    pub(super) fn valid(&self, now: SystemTime) -> Option<&Encoded> {
        self.encoded.as_deref().filter(|encoded| encoded.context.svid.is_valid(now))
    }

    /// The secret, unless nobody should use it any more at `now`: Envoy would take an expired certificate and serve it.
    pub(super) fn secret(&self, name: Name, now: SystemTime) -> Option<&Secret> {
        let encoded = match name {
            Name::Default => self.valid(now),
            Name::RootCa => self.encoded.as_deref(),
        };
        encoded?.secrets.iter().find(|secret| secret.name == name)
    }
}

impl Encoded {
    fn of(context: &Arc<X509Context>) -> Self {
        let X509Context { svid, bundle, .. } = &**context;
        let (svid_version, roots_version): (Arc<str>, _) = (svid.serial().into(), version_of(bundle));
        let pair = Type::TlsCertificate(TlsCertificate {
            certificate_chain: inline(svid.chain_pem().into_bytes()),
            private_key: inline(svid.key().pem().as_bytes().to_vec()),
        });
        let roots =
            Type::ValidationContext(CertificateValidationContext { trusted_ca: inline(bundle.pem().into_bytes()) });
        Self {
            context: Arc::clone(context),
            secrets: [
                Secret::new(Name::Default, &svid_version, pair),
                Secret::new(Name::RootCa, &roots_version, roots),
            ],
            svid: svids(svid, bundle),
            bundles: bundles(svid, bundle),
            svid_version,
            roots_version,
        }
    }
}

impl Secret {
    fn new(name: Name, version: &Arc<str>, kind: Type) -> Self {
        let message = EnvoySecret { name: name.as_str().to_owned(), r#type: Some(kind) };
        let any = prost_types::Any { type_url: TYPE_URL.to_owned(), value: message.encode_to_vec() };
        let secret = encoded(&any);
        let resource =
            DeltaSecret { version: version.to_string(), resource: secret.clone(), name: name.as_str().to_owned() };
        Self {
            name,
            version: Arc::clone(version),
            world: encoded(&SecretResponse { resources: vec![secret], ..Default::default() }),
            delta: encoded(&DeltaSecretResponse { resources: vec![resource], ..Default::default() }),
        }
    }
}

fn svids(svid: &X509Svid, bundle: &X509Bundle) -> Bytes {
    let one = X509svid {
        spiffe_id: svid.id().to_string(),
        x509_svid: der(svid.chain().iter().cloned()),
        x509_svid_key: svid.key().pkcs8().secret_der().to_vec(),
        bundle: der(bundle.roots()),
        hint: String::new(),
    };
    encoded(&X509svidResponse { svids: vec![one], ..Default::default() })
}

fn bundles(svid: &X509Svid, bundle: &X509Bundle) -> Bytes {
    let trust_domain = format!("spiffe://{}", svid.id().trust_domain());
    encoded(&X509BundlesResponse { bundles: [(trust_domain, der(bundle.roots()))].into(), ..Default::default() })
}

fn encoded(message: &impl prost::Message) -> Bytes {
    message.encode_to_vec().into()
}

fn inline(bytes: Vec<u8>) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineBytes(bytes)) })
}

/// One certificate after the other.
fn der<'a>(certificates: impl Iterator<Item = CertificateDer<'a>>) -> Vec<u8> {
    certificates.flat_map(|der| der.to_vec()).collect()
}

fn version_of(bundle: &X509Bundle) -> Arc<str> {
    let mut hash = DefaultHasher::new();
    bundle.roots().for_each(|root| root.as_ref().hash(&mut hash));
    format!("{:016x}", hash.finish()).into()
}
