//! A client of the lab with its own hands on HTTP/2, so that a test sees frames and not a library's view of them.
#![allow(clippy::unwrap_used, dead_code)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{PingPong, RecvStream, SendStream, client::SendRequest};
use http::{HeaderMap, Request};
use prost::Message;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

#[path = "../../src/proto.rs"]
#[allow(unused)]
pub(crate) mod proto;

use proto::{
    envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
    istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse},
};

pub(crate) const CREATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
pub(crate) const DELTA: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
pub(crate) const SOTW: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";
pub(crate) const EDS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
pub(crate) const CDS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
pub(crate) const HEALTH: &str = "type.googleapis.com/istio.v1.HealthInformation";

/// Nothing in these tests takes longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// A chain and its key, to be presented.
pub(crate) struct Pair {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: KeyPair,
}

/// A connection.
pub(crate) struct Client {
    pub(crate) requests: SendRequest<Bytes>,
    pub(crate) pings: PingPong,
    /// Ends when the connection does, with what h2 says of it.
    pub(crate) closed: tokio::task::JoinHandle<Result<(), h2::Error>>,
}

/// How a call ended: status, text, and whether it came in one HEADERS frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) message: String,
    pub(crate) trailers_only: bool,
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr, root_pem: &str, pair: Option<&Pair>) -> std::io::Result<Self> {
        Self::connect_with(address, root_pem, pair, rustls::DEFAULT_VERSIONS).await
    }

    pub(crate) async fn connect_with(
        address: SocketAddr,
        root_pem: &str,
        pair: Option<&Pair>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> std::io::Result<Self> {
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(root_pem.as_bytes()) {
            roots.add(root.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match pair {
            Some(pair) => config
                .with_client_auth_cert(pair.chain.clone(), PrivateKeyDer::try_from(pair.key.serialize_der()).unwrap())
                .unwrap(),
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        let tcp = TcpStream::connect(address).await?;
        let tls =
            TlsConnector::from(Arc::new(config)).connect("istiod.istio-system.svc".try_into().unwrap(), tcp).await?;
        let (requests, mut connection) = h2::client::handshake(tls).await.map_err(std::io::Error::other)?;
        let pings = connection.ping_pong().unwrap();
        Ok(Self { requests, pings, closed: tokio::spawn(connection) })
    }

    pub(crate) async fn call(&self, path: &str, headers: &[(&str, &str)]) -> Call {
        let mut request = Request::post(format!("https://istiod.istio-system.svc:15012{path}"));
        for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")].iter().chain(headers) {
            request = request.header(*name, *value);
        }
        let mut requests = self.requests.clone().ready().await.unwrap();
        let (response, body) = requests.send_request(request.body(()).unwrap(), false).unwrap();
        Call { response: Some(response), body, answers: None, buffer: BytesMut::new(), ended: None }
    }

    pub(crate) async fn sign(&self, token: Option<&str>, csr: &str, seconds: i64) -> Result<Vec<String>, Ended> {
        let bearer = token.map(|t| format!("Bearer {t}"));
        let headers: Vec<(&str, &str)> = bearer.iter().map(|b| ("authorization", b.as_str())).collect();
        let mut call = self.call(CREATE, &headers).await;
        call.send(&IstioCertificateRequest { csr: csr.to_owned(), validity_duration: seconds, metadata: None });
        match call.next::<IstioCertificateResponse>().await {
            Some(answer) => Ok(answer.cert_chain),
            None => Err(call.end().await),
        }
    }

    pub(crate) async fn register(&self, token: &str, request: &DeltaDiscoveryRequest) -> Call {
        let mut call = self.call(DELTA, &[("authorization", &format!("Bearer {token}"))]).await;
        call.send(request);
        call
    }
}

/// One call or stream.
pub(crate) struct Call {
    response: Option<h2::client::ResponseFuture>,
    pub(crate) body: SendStream<Bytes>,
    answers: Option<RecvStream>,
    buffer: BytesMut,
    ended: Option<Ended>,
}

impl Call {
    pub(crate) fn send(&mut self, message: &impl Message) {
        self.send_bytes(&message.encode_to_vec());
    }

    pub(crate) fn send_bytes(&mut self, message: &[u8]) {
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(message.len() as u32);
        frame.extend_from_slice(message);
        // A refusal may have come before; the answer tells.
        _ = self.body.send_data(frame.freeze(), false);
    }

    pub(crate) fn half_close(&mut self) {
        _ = self.body.send_data(Bytes::new(), true);
    }

    /// The next message, or `None` when the call has ended.
    pub(crate) async fn next<M: Message + Default>(&mut self) -> Option<M> {
        timeout(LIMIT, self.next_bytes()).await.expect("an answer in time").map(|bytes| M::decode(bytes).unwrap())
    }

    pub(crate) async fn next_delta(&mut self) -> DeltaDiscoveryResponse {
        self.next().await.expect("a message, not the end")
    }

    async fn next_bytes(&mut self) -> Option<Bytes> {
        if let Some(response) = self.response.take() {
            match response.await {
                Ok(response) => {
                    let (head, body) = response.into_parts();
                    if head.headers.contains_key("grpc-status") {
                        self.ended = Some(ended(&head.headers, true));
                        return None;
                    }
                    self.answers = Some(body);
                }
                Err(error) => return self.broken(&error),
            }
        }
        let answers = self.answers.as_mut()?;
        loop {
            if let Some((prefix, rest)) = self.buffer.split_first_chunk::<5>() {
                let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
                if rest.len() >= length {
                    self.buffer.advance(5);
                    return Some(self.buffer.split_to(length).freeze());
                }
            }
            match answers.data().await {
                Some(Ok(data)) => {
                    _ = answers.flow_control().release_capacity(data.len());
                    self.buffer.extend_from_slice(&data);
                }
                Some(Err(error)) => return self.broken(&error),
                None => {
                    let trailers = answers.trailers().await.unwrap_or_default().unwrap_or_default();
                    self.ended = Some(ended(&trailers, false));
                    return None;
                }
            }
        }
    }

    fn broken(&mut self, error: &h2::Error) -> Option<Bytes> {
        self.ended = Some(Ended { code: -1, message: error.to_string(), trailers_only: false });
        None
    }

    /// How it ended; code -1 is a reset or a lost connection. Messages before the end are skipped.
    pub(crate) async fn end(&mut self) -> Ended {
        while self.ended.is_none() {
            if timeout(LIMIT, self.next_bytes()).await.expect("the end in time").is_none() && self.ended.is_none() {
                break;
            }
        }
        self.ended.clone().expect("ended")
    }

    /// How it ended, if it did so in a while; for streams that should stay open.
    pub(crate) async fn ends_within(&mut self, limit: Duration) -> Option<Ended> {
        timeout(limit, self.end()).await.ok()
    }
}

fn ended(headers: &HeaderMap, trailers_only: bool) -> Ended {
    let text = |name: &str| headers.get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default();
    Ended { code: text("grpc-status").parse().unwrap_or(-1), message: text("grpc-message"), trailers_only }
}

/// A key and a CSR for it, as the agent would make them.
pub(crate) fn csr(uri: &str) -> (KeyPair, String) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "");
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    (key, csr)
}

/// Leaf and intermediates of an answer, with the key: what is to be presented.
pub(crate) fn pair(key: KeyPair, chain: &[String]) -> Pair {
    let certificates =
        chain[..chain.len() - 1].iter().map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap());
    Pair { chain: certificates.collect(), key }
}

/// The first request of an agent: a named EDS subscription with the node of a VM.
pub(crate) fn first(address: &str, metadata: &[(&str, &str)], names: &[&str]) -> DeltaDiscoveryRequest {
    let text = |s: &str| prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(s.to_owned())) };
    let mut fields: std::collections::BTreeMap<String, prost_types::Value> =
        metadata.iter().map(|(k, v)| ((*k).to_owned(), text(v))).collect();
    fields.insert("INSTANCE_IPS".to_owned(), text(address));
    let namespace = metadata.iter().find(|(k, _)| *k == "NAMESPACE").map_or("vms", |(_, v)| v);
    let node = proto::envoy::config::core::v3::Node {
        id: format!("sidecar~{address}~vm1.{namespace}~{namespace}.svc.cluster.local"),
        metadata: Some(prost_types::Struct { fields }),
        ..Default::default()
    };
    DeltaDiscoveryRequest {
        node: Some(node),
        type_url: EDS.to_owned(),
        resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
        ..Default::default()
    }
}

/// The same with a readiness probe in its proxy configuration.
pub(crate) fn with_probe(mut request: DeltaDiscoveryRequest) -> DeltaDiscoveryRequest {
    use prost_types::{Struct, Value, value::Kind};
    let object = |key: &str, value: Value| Value {
        kind: Some(Kind::StructValue(Struct { fields: [(key.to_owned(), value)].into() })),
    };
    let probe =
        object("readinessProbe", object("httpGet", object("port", Value { kind: Some(Kind::NumberValue(8080.0)) })));
    let metadata = request.node.as_mut().and_then(|n| n.metadata.as_mut()).unwrap();
    metadata.fields.insert("PROXY_CONFIG".to_owned(), probe);
    request
}

/// A health report.
pub(crate) fn health(unhealthy: Option<&str>) -> DeltaDiscoveryRequest {
    let error_detail = unhealthy.map(|m| proto::google::rpc::Status { code: 13, message: m.to_owned() });
    DeltaDiscoveryRequest { type_url: HEALTH.to_owned(), error_detail, ..Default::default() }
}

/// Waits until a condition holds.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = tokio::time::Instant::now() + LIMIT;
    while !holds() {
        assert!(tokio::time::Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
