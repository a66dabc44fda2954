//! The two forms of the protocol: state of the world, and incremental.

use super::{
    secrets::{Name, TYPE_URL},
    subscription::{Ask, Names, Reply},
};
use crate::proto::{
    envoy::service::secret::v3::{
        Consumer, DeltaSecret, DeltaSecretRequest, DeltaSecretResponse, SecretRequest, SecretResponse,
    },
    google::rpc,
};
use prost::Message;
use tonic::Status;

/// Nobody needs more names in one request, for there are two.
const MAX_NAMES: usize = 16;

/// A request of either form.
pub(in crate::publish) trait Request: Message + Default + 'static {
    /// Of the same form.
    type Response: Message;

    /// Reads it; what is not served is refused with the reason.
    fn read(self) -> Result<Ask, Status>;

    /// Writes a response.
    fn write(reply: &Reply<'_>) -> Self::Response;
}

impl Request for SecretRequest {
    type Response = SecretResponse;

    fn read(self) -> Result<Ask, Status> {
        check_type(&self.type_url)?;
        Ok(Ask {
            node: self.node.map(node),
            names: Names::Exactly(names(&self.resource_names)?),
            nonce: self.response_nonce,
            refusal: self.error_detail.map(refusal),
        })
    }

    fn write(reply: &Reply<'_>) -> SecretResponse {
        SecretResponse {
            version_info: version(reply),
            resources: reply.secrets.iter().map(|secret| secret.any.clone()).collect(),
            type_url: TYPE_URL.to_owned(),
            nonce: reply.nonce.clone(),
        }
    }
}

impl Request for DeltaSecretRequest {
    type Response = DeltaSecretResponse;

    fn read(self) -> Result<Ask, Status> {
        check_type(&self.type_url)?;
        Ok(Ask {
            node: self.node.map(node),
            names: Names::Change {
                add: names(&self.resource_names_subscribe)?,
                // What was never given can be left.
                drop: self.resource_names_unsubscribe.iter().filter_map(|name| Name::parse(name).ok()).collect(),
            },
            nonce: self.response_nonce,
            refusal: self.error_detail.map(refusal),
        })
    }

    fn write(reply: &Reply<'_>) -> DeltaSecretResponse {
        let resource = |secret: &&super::secrets::Secret| DeltaSecret {
            version: secret.version.to_string(),
            resource: secret.any.clone(),
            name: secret.name.as_str().to_owned(),
        };
        DeltaSecretResponse {
            system_version_info: version(reply),
            resources: reply.secrets.iter().map(resource).collect(),
            type_url: TYPE_URL.to_owned(),
            nonce: reply.nonce.clone(),
        }
    }
}

fn version(reply: &Reply<'_>) -> String {
    let versions: Vec<_> = reply.secrets.iter().map(|secret| secret.version.as_ref()).collect();
    versions.join(",")
}

fn check_type(url: &str) -> Result<(), Status> {
    if url.is_empty() || url == TYPE_URL {
        return Ok(());
    }
    Err(Status::invalid_argument(format!("{url:.200}: here is nothing but {TYPE_URL}")))
}

fn names(names: &[String]) -> Result<Vec<Name>, Status> {
    if names.len() > MAX_NAMES {
        return Err(Status::invalid_argument(format!("{} names at once; there are default and ROOTCA", names.len())));
    }
    names.iter().map(|name| Name::parse(name)).collect()
}

/// A name for status and journal, so at a bounded length and without line breaks.
fn node(consumer: Consumer) -> String {
    printable(&consumer.id, 128)
}

fn refusal(status: rpc::Status) -> String {
    printable(&status.message, 512)
}

fn printable(text: &str, most: usize) -> String {
    text.chars().take(most).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
