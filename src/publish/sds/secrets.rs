//! What consumers are given, encoded once for all of them.

use crate::{
    proto::envoy::extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, DataSource, Secret as Message, TlsCertificate, data_source::Specifier,
        secret::Type,
    },
    publish::consumers::{version_of_roots, version_of_svid},
    spiffe::X509Context,
};
use bytes::Bytes;
use prost::Message as _;
use std::{
    sync::{Arc, Weak},
    time::SystemTime,
};
use tonic::Status;
use zeroize::{Zeroize as _, Zeroizing};

/// The type of every resource here.
pub(super) const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// A name that is served; the words are those that istiod writes into Envoy's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::publish) enum Name {
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

/// One secret, ready to be sent.
pub(in crate::publish) struct Secret {
    pub(super) name: Name,
    /// See [`version_of_svid`] and [`version_of_roots`].
    pub(super) version: Arc<str>,
    /// The `google.protobuf.Any`; shared by all who are sent it, and wiped when the last lets go.
    pub(super) any: Bytes,
    /// When it ends to be useful.
    not_after: Option<SystemTime>,
}

/// Both secrets of one identity; none before the first certificate. Cheap to clone.
#[derive(Clone, Default)]
pub(in crate::publish) struct Secrets(Option<Arc<Encoded>>);

/// The secrets, and what they were made of.
struct Encoded {
    context: Weak<X509Context>,
    secrets: [Secret; 2],
}

impl Secrets {
    /// Encodes what `context` holds: both always belong together.
    pub(in crate::publish) fn of(context: &Arc<X509Context>) -> Self {
        let svid = &context.svid;
        let certificate = Type::TlsCertificate(TlsCertificate {
            certificate_chain: inline(svid.chain_pem().into_bytes()),
            private_key: inline(svid.key().pem().as_bytes().to_vec()),
        });
        let roots = Type::ValidationContext(CertificateValidationContext {
            trusted_ca: inline(context.bundle.pem().into_bytes()),
        });
        let secrets = [
            Secret {
                name: Name::Default,
                version: version_of_svid(svid),
                any: encode(Name::Default, certificate),
                not_after: Some(svid.not_after()),
            },
            Secret {
                name: Name::RootCa,
                version: version_of_roots(&context.bundle),
                any: encode(Name::RootCa, roots),
                not_after: None,
            },
        ];
        Self(Some(Arc::new(Encoded { context: Arc::downgrade(context), secrets })))
    }

    /// Whether they are those of `context`.
    pub(in crate::publish) fn is_of(&self, context: &Arc<X509Context>) -> bool {
        self.0.as_ref().is_some_and(|encoded| std::ptr::eq(encoded.context.as_ptr(), Arc::as_ptr(context)))
    }

    /// The secret, unless nobody should use it any more at `now`: Envoy would take an expired certificate and serve it.
    pub(super) fn get(&self, name: Name, now: SystemTime) -> Option<&Secret> {
        let secret = self.0.iter().flat_map(|encoded| &encoded.secrets).find(|secret| secret.name == name)?;
        secret.not_after.is_none_or(|end| now < end).then_some(secret)
    }
}

fn inline(bytes: Vec<u8>) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineBytes(bytes)) })
}

/// The `Any` of a secret. Every copy of the key on the way is wiped.
fn encode(name: Name, kind: Type) -> Bytes {
    let mut message = Message { name: name.as_str().to_owned(), r#type: Some(kind) };
    let mut any = prost_types::Any { type_url: TYPE_URL.to_owned(), value: message.encode_to_vec() };
    if let Some(Type::TlsCertificate(TlsCertificate { private_key: Some(key), .. })) = &mut message.r#type
        && let Some(Specifier::InlineBytes(bytes)) = &mut key.specifier
    {
        bytes.zeroize();
    }
    let encoded = Zeroizing::new(any.encode_to_vec());
    any.value.zeroize();
    Bytes::from_owner(encoded)
}
