//! The two forms of the protocol: state of the world, and incremental.

use super::{
    Name,
    subscription::{Ask, Names, Reply},
};
use crate::{
    proto::{
        envoy::service::secret::v3::{
            Consumer, DeltaSecretRequest, DeltaSecretResponse, SecretRequest, SecretResponse,
        },
        google::rpc,
    },
    publish::{grpc::Framed, offer::TYPE_URL},
    text::one_line,
};
use prost::Message;
use tonic::Status;

/// Nobody needs more names at a time, for there are two.
pub(super) const MAX_NAMES: usize = 16;
/// Nor longer ones: what is not here comes back by its name.
const MAX_NAME: usize = 1 << 10;

/// A request of either form.
pub(in crate::publish) trait Request: Message + Default {
    /// Reads it; what is not served is refused with the reason.
    fn read(self) -> Result<Ask, Status>;

    /// Writes a response of the same form.
    fn write(reply: Reply<'_>) -> Framed;
}

impl Request for SecretRequest {
    fn read(self) -> Result<Ask, Status> {
        check(&self.type_url, &self.resource_names)?;
        let names = self.resource_names.iter().map(|name| Name::parse(name)).collect::<Result<_, _>>()?;
        Ok(Ask {
            node: self.node.map(node),
            names: Names::Exactly(names),
            unknown: Vec::new(),
            nonce: self.response_nonce,
            refusal: self.error_detail.map(refusal),
        })
    }

    fn write(reply: Reply<'_>) -> Framed {
        let own = SecretResponse {
            version_info: version(&reply),
            type_url: TYPE_URL.to_owned(),
            nonce: reply.nonce,
            ..Default::default()
        };
        Framed::new(&own, reply.secrets.iter().map(|secret| secret.world.clone()).collect())
    }
}

impl Request for DeltaSecretRequest {
    fn read(self) -> Result<Ask, Status> {
        check(&self.type_url, &self.resource_names_subscribe)?;
        let names = Names::Change {
            add: known(&self.resource_names_subscribe),
            // What was never given can be left.
            drop: known(&self.resource_names_unsubscribe),
        };
        Ok(Ask {
            node: self.node.map(node),
            names,
            unknown: self.resource_names_subscribe.into_iter().filter(|name| Name::parse(name).is_err()).collect(),
            nonce: self.response_nonce,
            refusal: self.error_detail.map(refusal),
        })
    }

    fn write(reply: Reply<'_>) -> Framed {
        let own = DeltaSecretResponse {
            system_version_info: version(&reply),
            type_url: TYPE_URL.to_owned(),
            removed_resources: reply.unknown,
            nonce: reply.nonce,
            ..Default::default()
        };
        Framed::new(&own, reply.secrets.iter().map(|secret| secret.delta.clone()).collect())
    }
}

fn version(reply: &Reply<'_>) -> String {
    let versions: Vec<_> = reply.secrets.iter().map(|secret| secret.version.as_ref()).collect();
    versions.join(",")
}

fn check(url: &str, names: &[String]) -> Result<(), Status> {
    if !(url.is_empty() || url == TYPE_URL) {
        return Err(Status::invalid_argument(format!("{url:.200}: here is nothing but {TYPE_URL}")));
    }
    if names.len() > MAX_NAMES {
        return Err(Status::invalid_argument(format!("{} names at once; there are default and ROOTCA", names.len())));
    }
    if names.iter().any(|name| name.len() > MAX_NAME) {
        return Err(Status::invalid_argument(format!("a name of over {MAX_NAME} bytes; there are default and ROOTCA")));
    }
    Ok(())
}

fn known(names: &[String]) -> Vec<Name> {
    names.iter().filter_map(|name| Name::parse(name).ok()).collect()
}

/// A name for status and journal, so at a bounded length and without line breaks.
fn node(consumer: Consumer) -> String {
    one_line(&consumer.id, 128)
}

fn refusal(status: rpc::Status) -> String {
    one_line(&status.message, 512)
}
