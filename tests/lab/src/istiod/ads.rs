//! One aggregated discovery stream, in either encoding.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    Istiod, Orders,
    discovery::{Registry, Resources, types},
    node::Node,
    registration::Lease,
    subscription::{Request, Rpc, Subscription, Wanted, read},
};
use crate::{
    event::What,
    fault::Fault,
    grpc::{End, Reader, Status, Writer, code},
    mesh::Identity,
    proto::{
        envoy::{
            config::core::v3 as core,
            service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse, Resource},
        },
        google::rpc,
    },
    store::uid,
};

/// What a stream is told apart by in the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Id {
    pub(super) connection: u64,
    pub(super) stream: u64,
}

/// A stream after its first request.
struct Session {
    istiod: Arc<Istiod>,
    rpc: Rpc,
    id: Id,
    node: Arc<Node>,
    lease: Option<Lease>,
    subscriptions: BTreeMap<String, Subscription>,
    /// The picture that was pushed last.
    seen: Registry,
}

/// How a stream ended on the lab's side.
enum Ending {
    Status(Status),
    Reset,
    /// Nothing is to be sent: the other side, or the whole connection, is gone.
    Gone,
}

impl From<End> for Ending {
    fn from(end: End) -> Self {
        match end {
            End::Half => Self::Status(Status::new(code::OK, "")),
            End::Lost => Self::Gone,
            End::Refused(status) => Self::Status(status),
        }
    }
}

impl Istiod {
    /// Serves an authenticated stream to its end. While `down` is not cancelled its end disconnects the entry.
    pub(super) async fn serve_stream(
        self: Arc<Self>,
        rpc: Rpc,
        id: Id,
        identity: Identity,
        mut reader: Reader,
        mut writer: Writer,
        down: CancellationToken,
    ) {
        let accepted = SystemTime::now();
        let orders = self.orders.subscribe();
        let mut session = None;
        let run = async {
            if self.faults.has(Fault::Silent) {
                loop {
                    read(rpc, &mut reader).await?;
                }
            }
            let (opened, first) = self.open(rpc, id, &identity, &mut reader, accepted).await?;
            session.insert(opened).run(first, &mut reader, &mut writer).await
        };
        let ending = tokio::select! {
            biased;
            () = down.cancelled() => Ending::Gone,
            () = reset(orders) => Ending::Reset,
            Err(ending) = run => ending,
            else => Ending::Gone,
        };
        match &ending {
            Ending::Status(status) if status.code != code::OK => self.log.push(What::StreamRefused {
                connection: id.connection,
                stream: id.stream,
                code: status.code,
                message: status.message.clone(),
            }),
            _ if session.is_some() => {
                self.log.push(What::StreamClosed { connection: id.connection, stream: id.stream })
            }
            _ => {}
        }
        match ending {
            Ending::Status(status) => writer.finish(&status),
            Ending::Reset => writer.reset(),
            Ending::Gone => {}
        }
        if let Some(lease) = session.and_then(|s| s.lease).filter(|_| !down.is_cancelled()) {
            self.disconnect(&lease);
        }
    }

    /// Comes at once, again and again, while a flood is ordered.
    async fn flood(&self) {
        if !self.faults.has(Fault::Flood) {
            std::future::pending::<()>().await;
        }
        tokio::task::yield_now().await;
    }

    /// Waits for the first request that is no health report, and registers.
    async fn open(
        self: &Arc<Self>,
        rpc: Rpc,
        id: Id,
        identity: &Identity,
        reader: &mut Reader,
        accepted: SystemTime,
    ) -> Result<(Session, Request), Ending> {
        let first = loop {
            let request = read(rpc, reader).await?;
            if request.type_url != types::HEALTH {
                break request;
            }
            // A report before the first request is dropped without a word, and its node with it.
            self.log.push(What::Health {
                entry: None,
                stream: id.stream,
                healthy: request.error.is_none(),
                message: message_of(request.error),
                lost: true,
            });
        };
        let node = Arc::new(Node::parse(first.node.as_ref()).map_err(Ending::Status)?);
        let foreign = identity.namespace != node.config_namespace
            || !node.service_account.is_empty() && identity.account != node.service_account;
        if foreign {
            let text = format!(
                "authorization failed: no identities ([{}]) matched {}/{}",
                identity.uri, node.config_namespace, node.service_account
            );
            return Err(Ending::Status(Status::new(code::PERMISSION_DENIED, text)));
        }
        let lease = self.connect(&node, identity, accepted).map_err(Ending::Status)?;
        self.log.push(What::StreamOpened {
            connection: id.connection,
            stream: id.stream,
            node: node.name.clone(),
            observer: lease.is_none(),
            type_url: first.type_url.clone(),
            identity: identity.uri.clone(),
        });
        let (subscriptions, seen) = (BTreeMap::new(), Registry::clone(&self.registry.borrow()));
        let session = Session { istiod: Arc::clone(self), rpc, id, node, lease, subscriptions, seen };
        Ok((session, first))
    }
}

impl Session {
    async fn run(&mut self, first: Request, reader: &mut Reader, writer: &mut Writer) -> Result<(), Ending> {
        let mut registry = self.istiod.registry.subscribe();
        self.take(first, &current(&mut registry), writer)?;
        loop {
            tokio::select! {
                request = read(self.rpc, reader) => self.take(request?, &registry.borrow().clone(), writer)?,
                changed = registry.changed() => {
                    changed.map_err(|_| Ending::Gone)?;
                    self.push(&current(&mut registry), writer);
                }
                () = self.istiod.flood() => self.push_again(&registry.borrow().clone(), writer),
            }
        }
    }

    fn take(&mut self, request: Request, registry: &Registry, writer: &mut Writer) -> Result<(), Ending> {
        let type_url = request.type_url.as_str();
        if type_url == types::HEALTH {
            let unhealthy = request.error.map(|e| e.message);
            self.istiod.report(self.lease.as_ref(), self.id.stream, unhealthy);
            return Ok(());
        }
        if ![types::CLUSTER, types::ENDPOINT, types::NAMES, types::PROXY_CONFIG].contains(&type_url)
            && !types::SILENT.contains(&type_url)
        {
            let text = "the api generator is restricted to the control-plane (root) namespace";
            return Err(Ending::Status(Status::new(code::PERMISSION_DENIED, text)));
        }
        if let Some(error) = request.error {
            let subscribed =
                self.subscriptions.get(type_url).is_some_and(|s| type_url != types::ENDPOINT || !s.names.is_empty());
            if !subscribed {
                self.istiod.crash(format!(
                    "an error detail on {type_url}, which stream {} had not subscribed to",
                    self.id.stream
                ));
                return Err(Ending::Gone);
            }
            self.istiod.log.push(What::Nack {
                stream: self.id.stream,
                type_url: request.type_url,
                message: error.message,
            });
            return Ok(());
        }
        let known = self.subscriptions.contains_key(type_url);
        let subscription = self.subscriptions.entry(request.type_url.clone()).or_default();
        let wanted = match self.rpc {
            Rpc::Delta => subscription.subscribe(&request, known),
            Rpc::StateOfTheWorld => subscription.state(&request),
        };
        if let Some(wanted) = wanted {
            let resources = self.resources(registry, &request.type_url, Some(wanted));
            self.send(&request.type_url, resources, Vec::new(), registry, writer);
        }
        Ok(())
    }

    /// Sends the endpoints that were subscribed once more.
    fn push_again(&mut self, registry: &Registry, writer: &mut Writer) {
        let resources = self.resources(registry, types::ENDPOINT, None);
        self.send(types::ENDPOINT, resources, Vec::new(), registry, writer);
    }

    /// Sends what has changed of everything that was subscribed. The endpoints of a service that was removed are sent
    /// though there were none before.
    fn push(&mut self, registry: &Registry, writer: &mut Writer) {
        let removed = |registry: &Registry, name: &String| self.seen.has(name) && !registry.has(name);
        let orphans: BTreeSet<String> = self
            .subscriptions
            .get(types::ENDPOINT)
            .map(|endpoints| endpoints.names.iter().filter(|name| removed(registry, name)).cloned().collect())
            .unwrap_or_default();
        self.seen = registry.clone();
        let subscribed: Vec<String> = self.subscriptions.keys().cloned().collect();
        for type_url in subscribed {
            let Some(now) = self.resources(registry, &type_url, None) else { continue };
            let Some(subscription) = self.subscriptions.get(&type_url) else { continue };
            let removed: Vec<String> =
                subscription.sent.keys().filter(|name| !now.contains_key(*name)).cloned().collect();
            let changed: Resources = now
                .iter()
                .filter(|(name, r)| {
                    subscription.sent.get(*name) != Some(r) || type_url == types::ENDPOINT && orphans.contains(*name)
                })
                .map(|(n, r)| (n.clone(), r.clone()))
                .collect();
            if changed.is_empty() && removed.is_empty() {
                continue;
            }
            // State of the world means that: only endpoints may come in part.
            let whole = self.rpc == Rpc::StateOfTheWorld && type_url != types::ENDPOINT;
            self.send(&type_url, Some(if whole { now } else { changed }), removed, registry, writer);
        }
    }

    /// The resources of a type that the stream wants, all or some of them; `None` if the type is never answered.
    fn resources(&self, registry: &Registry, type_url: &str, some: Option<Wanted>) -> Option<Resources> {
        match type_url {
            types::CLUSTER => {
                let padding = self
                    .istiod
                    .faults
                    .find(|f| if let Fault::ObserverTooBig(mib) = f { Some(mib * 512) } else { None });
                Some(registry.clusters(&self.node, padding.unwrap_or_default()))
            }
            types::ENDPOINT => {
                let names = match some {
                    Some(Wanted::These(names)) => names,
                    _ => self.subscriptions.get(type_url)?.names.iter().cloned().collect(),
                };
                let assignments: Resources = names.into_iter().map(|n| (n.clone(), registry.assignment(&n))).collect();
                Some(assignments).filter(|a| !a.is_empty())
            }
            types::PROXY_CONFIG if self.istiod.settings.multiroot => {
                Some([(String::new(), registry.proxy_config())].into())
            }
            types::NAMES => Some([(String::new(), registry.names())].into()),
            _ => None,
        }
    }

    fn send(
        &mut self,
        type_url: &str,
        resources: Option<Resources>,
        removed: Vec<String>,
        registry: &Registry,
        writer: &mut Writer,
    ) {
        let Some(resources) = resources else { return };
        let Some(subscription) = self.subscriptions.get_mut(type_url) else { return };
        subscription.nonce = format!("{}{}", registry.version, uid());
        subscription.sent.retain(|name, _| !removed.contains(name));
        subscription.sent.extend(resources.clone());
        let identifier =
            format!(r#"{{"Component":"istiod","ID":"{}","Info":{{"version":"we-lab"}}}}"#, self.istiod.settings.name);
        let control_plane = Some(core::ControlPlane { identifier });
        let names: Vec<String> = resources.keys().take(64).cloned().collect();
        let (version, nonce, type_url) = (registry.version.clone(), subscription.nonce.clone(), type_url.to_owned());
        let bytes = match self.rpc {
            Rpc::Delta => {
                let resources = resources
                    .into_iter()
                    .map(|(name, r)| Resource { version: String::new(), resource: Some(r), name })
                    .collect();
                writer.send(&DeltaDiscoveryResponse {
                    system_version_info: version,
                    resources,
                    type_url: type_url.clone(),
                    nonce,
                    removed_resources: removed,
                    control_plane,
                })
            }
            Rpc::StateOfTheWorld => {
                let resources = resources.into_values().collect();
                writer.send(&DiscoveryResponse {
                    version_info: version,
                    resources,
                    type_url: type_url.clone(),
                    nonce,
                    control_plane,
                })
            }
        };
        self.istiod.log.push(What::Pushed { stream: self.id.stream, type_url, resources: names, bytes });
    }
}

fn current(registry: &mut watch::Receiver<Arc<Registry>>) -> Arc<Registry> {
    Arc::clone(&registry.borrow_and_update())
}

fn message_of(error: Option<rpc::Status>) -> String {
    error.map(|e| e.message).unwrap_or_default()
}

/// Ends when the streams are ordered to drop.
async fn reset(mut orders: watch::Receiver<Orders>) {
    let before = orders.borrow().streams;
    if orders.wait_for(|o| o.streams != before).await.is_err() {
        std::future::pending::<()>().await;
    }
}
