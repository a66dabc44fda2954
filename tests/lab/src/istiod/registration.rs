//! From streams to entries: what a connect, a report and a disconnect do to the store.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{Arc, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use super::{Istiod, node::Node};
use crate::{
    event::What,
    fault::Fault,
    group::Group,
    grpc::{Status, code},
    mesh::Identity,
    store::{Condition, WorkloadEntry, annotation, rfc3339_nano},
};

/// Namespace and name of an entry.
pub(crate) type Key = (String, String);

/// One stream's hold on an entry. Several streams may hold the same.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) key: Key,
    /// The `connectedAt` that this stream wrote: its accept time.
    connected: String,
    node: Arc<Node>,
    identity: Identity,
}

/// The streams of this instance, by the entry that they hold.
pub(crate) type Leases = BTreeMap<Key, Vec<Lease>>;

impl Istiod {
    /// Registers what the node asks for. Nothing to register is no error.
    pub(super) fn connect(
        &self,
        node: &Arc<Node>,
        identity: &Identity,
        accepted: SystemTime,
    ) -> Result<Option<Lease>, Status> {
        let key = match (node.group.as_str(), node.workload_entry.as_str()) {
            ("", "") => return Ok(None),
            _ if node.namespace.is_empty() => return Ok(None),
            ("", entry) => (node.namespace.clone(), entry.to_owned()),
            (group, _) => (node.namespace.clone(), entry_name(group, node)),
        };
        let lease =
            Lease { key, connected: rfc3339_nano(accepted), node: Arc::clone(node), identity: identity.clone() };
        let held = if node.group.is_empty() {
            self.take_existing(&lease)?
        } else {
            self.take_or_create(&lease).map(|()| true)?
        };
        if !held {
            return Ok(None);
        }
        self.leases().entry(lease.key.clone()).or_default().push(lease.clone());
        Ok(Some(lease))
    }

    fn take_or_create(&self, lease: &Lease) -> Result<(), Status> {
        let (namespace, name) = &lease.key;
        let entry = self.mesh.store.read().entries.get(&lease.key).cloned();
        if let Some(entry) = entry {
            verify(&entry.namespace, &entry.spec.service_account, &lease.identity)?;
            self.api_conflict(&lease.key, Some(&entry))?;
            self.api_answers(|| format!("failed updating WorkloadEntry {namespace}/{name} err: Put"), namespace, name)?;
            self.take(lease);
            return Ok(());
        }
        let failed = |cause: String| format!("auto-registration WorkloadEntry of {} failed: {cause}", lease.node.name);
        let group = (namespace.clone(), lease.node.group.clone());
        let missing = || {
            Status::new(code::FAILED_PRECONDITION, failed(format!("cannot find WorkloadGroup {}/{}", group.0, group.1)))
        };
        if self.faults.has(Fault::NoGroup) {
            return Err(missing());
        }
        let group = self.mesh.store.read().groups.get(&group).cloned().ok_or_else(missing)?;
        verify(&group.namespace, &group.template.service_account, &lease.identity)?;
        self.api_conflict(&lease.key, None)?;
        let creation = |cause: String| failed(format!("error creating WorkloadEntry: {cause}"));
        self.api_answers(|| creation("Post".to_owned()), namespace, name)?;
        let entry = self.entry_of(&group, lease);
        valid(&entry).map_err(|cause| {
            let text = format!("WorkloadEntry.networking.istio.io {:?} is invalid: {cause}", entry.name);
            Status::new(code::UNKNOWN, creation(text))
        })?;
        let (name, uid) = (entry.key(), entry.uid.clone());
        let created = self.mesh.store.write(|s| match s.entries.entry(lease.key.clone()) {
            Entry::Vacant(place) => Some(_ = place.insert(entry)),
            Entry::Occupied(_) => None,
        });
        // Somebody else was faster by a hair.
        created.ok_or_else(|| {
            Status::new(
                code::UNKNOWN,
                creation(format!("workloadentries.networking.istio.io {:?} already exists", lease.key.1)),
            )
        })?;
        self.log.push(What::EntryCreated { entry: name, uid });
        Ok(())
    }

    /// The `WORKLOAD_ENTRY` way: an entry somebody else made, taken only if it asks for health checks.
    fn take_existing(&self, lease: &Lease) -> Result<bool, Status> {
        let (namespace, name) = &lease.key;
        let entry = self.mesh.store.read().entries.get(&lease.key).cloned();
        let Some(entry) = entry else {
            let text =
                "proxy metadata indicates that it must correspond to an existing WorkloadEntry, however WorkloadEntry";
            return Err(Status::new(code::UNKNOWN, format!("{text} {namespace}/{name} is not found")));
        };
        verify(&entry.namespace, &entry.spec.service_account, &lease.identity)?;
        if !entry.annotations.contains_key(annotation::HEALTH) {
            return Ok(false);
        }
        self.take(lease);
        Ok(true)
    }

    /// Spec and labels of an entry that exists stay as they are.
    fn take(&self, lease: &Lease) {
        let uid = self.mesh.store.write(|s| {
            let entry = s.entries.get_mut(&lease.key)?;
            entry.annotations.remove(annotation::DISCONNECTED);
            entry.annotations.insert(annotation::CONNECTED.to_owned(), lease.connected.clone());
            entry.annotations.insert(annotation::CONTROLLER.to_owned(), self.settings.name.clone());
            Some(entry.uid.clone())
        });
        if let Some(uid) = uid {
            self.log.push(What::EntryConnected { entry: name_of(&lease.key), uid });
        }
    }

    fn entry_of(&self, group: &Group, lease: &Lease) -> WorkloadEntry {
        let node = &lease.node;
        let mut labels = group.template.labels.clone();
        labels.extend(group.entry_labels.clone());
        labels.extend(node.labels.clone());
        labels.remove("istio-locality");
        let mut spec = group.template.clone();
        spec.address.clone_from(&node.address);
        spec.labels.clone_from(&labels);
        if !node.network.is_empty() {
            spec.network.clone_from(&node.network);
        }
        if let Some(locality) = &node.locality {
            spec.locality.clone_from(locality);
        }
        let mut entry = WorkloadEntry::new(&lease.key.0, &lease.key.1, spec);
        entry.labels = labels;
        entry.owner = Some((group.name.clone(), group.uid.clone()));
        entry.annotations.insert(annotation::GROUP.to_owned(), group.name.clone());
        entry.annotations.extend(group.entry_annotations.clone());
        if node.probe {
            entry.annotations.insert(annotation::HEALTH.to_owned(), "true".to_owned());
        }
        entry.annotations.insert(annotation::CONTROLLER.to_owned(), self.settings.name.clone());
        entry.annotations.insert(annotation::CONNECTED.to_owned(), lease.connected.clone());
        entry
    }

    /// A stream ended. Only the last one of an entry marks it, and only if it was also the last that connected:
    /// istiod's own quirk, by which closing the newer stream first leaks the entry.
    pub(super) fn disconnect(self: &Arc<Self>, lease: &Lease) {
        let last = {
            let mut leases = self.leases();
            let left = leases.get_mut(&lease.key).map_or(0, |held| {
                if let Some(i) = held.iter().position(|l| l.connected == lease.connected) {
                    held.remove(i);
                }
                held.len()
            });
            if left == 0 {
                leases.remove(&lease.key);
            }
            left == 0
        };
        if !last || self.api_is_down().is_some() {
            return;
        }
        let at = rfc3339_nano(SystemTime::now());
        let marked = self.mesh.store.write(|s| {
            let entry = s.entries.get_mut(&lease.key)?;
            let ours = entry.annotations.get(annotation::CONTROLLER) == Some(&self.settings.name)
                && entry.connected_at() == Some(&lease.connected);
            if !ours {
                return None;
            }
            entry.annotations.remove(annotation::CONNECTED);
            entry.annotations.insert(annotation::DISCONNECTED.to_owned(), at.clone());
            Some(entry.uid.clone())
        });
        let Some(uid) = marked else { return };
        self.log.push(What::EntryDisconnected { entry: name_of(&lease.key), uid: uid.clone() });
        let (istiod, key) = (Arc::clone(self), lease.key.clone());
        self.spawn(async move {
            tokio::time::sleep(istiod.settings.grace).await;
            istiod.clean_up(&key, &uid, &at);
        });
    }

    /// A reconnect meanwhile, and another disconnect, have a grace of their own: only this very mark counts.
    fn clean_up(&self, key: &Key, uid: &str, at: &str) {
        let deleted = self.mesh.store.write(|s| {
            let entry = s
                .entries
                .get_mut(key)
                .filter(|e| e.uid == uid && e.connected_at().is_none() && e.disconnected_at() == Some(at))?;
            if entry.annotations.contains_key(annotation::GROUP) {
                return s.entries.remove(key);
            }
            entry.conditions.retain(|c| c.kind != "Healthy");
            None
        });
        if let Some(entry) = deleted {
            self.log.push(What::EntryDeleted { entry: entry.key(), uid: entry.uid });
        }
    }

    /// Takes a health report; nobody is ever told if it is lost.
    pub(super) fn report(self: &Arc<Self>, lease: Option<&Lease>, stream: u64, unhealthy: Option<String>) {
        let Some(late) = self.faults.find(|f| if let Fault::SlowReports(late) = f { Some(*late) } else { None }) else {
            return self.write_report(lease, stream, unhealthy);
        };
        let (istiod, lease) = (Arc::clone(self), lease.cloned());
        self.spawn(async move {
            tokio::time::sleep(late).await;
            let open = |lease: &Lease| {
                istiod.leases().get(&lease.key).is_some_and(|l| l.iter().any(|l| l.connected == lease.connected))
            };
            istiod.write_report(lease.as_ref().filter(|l| open(l)), stream, unhealthy);
        });
    }

    fn write_report(&self, lease: Option<&Lease>, stream: u64, unhealthy: Option<String>) {
        let now = rfc3339_nano(SystemTime::now());
        let (healthy, message) = (unhealthy.is_none(), unhealthy.unwrap_or_default());
        let written =
            lease.filter(|_| self.api_is_down().is_none() && !self.faults.lose_report()).is_some_and(|lease| {
                self.mesh.store.write(|s| {
                    let Some(entry) = s.entries.get_mut(&lease.key) else { return false };
                    let controlled = entry.annotations.get(annotation::CONTROLLER) == Some(&self.settings.name);
                    let newer = entry.conditions.iter().any(|c| c.kind == "Healthy" && c.last_probe_time > now);
                    if !controlled || newer {
                        return false;
                    }
                    entry.conditions.retain(|c| c.kind != "Healthy");
                    let status = if healthy { "True" } else { "False" };
                    let condition = Condition {
                        kind: "Healthy".to_owned(),
                        status: status.to_owned(),
                        message: message.clone(),
                        last_probe_time: now.clone(),
                        last_transition_time: now,
                    };
                    entry.conditions.push(condition);
                    true
                })
            });
        self.log.push(What::Health { entry: lease.map(|l| name_of(&l.key)), stream, healthy, message, lost: !written });
    }

    /// A group (re)appeared: the proxies of it that are connected get their entries at once.
    pub(crate) fn group_added(&self) {
        let held: Vec<Lease> = self.leases().values().filter_map(|l| l.last().cloned()).collect();
        for lease in held.iter().filter(|l| !l.node.group.is_empty()) {
            if !self.mesh.store.read().entries.contains_key(&lease.key) {
                _ = self.take_or_create(lease);
            }
        }
    }

    pub(super) fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn api_is_down(&self) -> Option<Duration> {
        self.faults.find(|f| if let Fault::ApiServerDown(wait) = f { Some(*wait) } else { None })
    }

    fn api_answers(&self, what: impl FnOnce() -> String, namespace: &str, name: &str) -> Result<(), Status> {
        let Some(_) = self.api_is_down() else { return Ok(()) };
        let url = format!("https://10.96.0.1:443/apis/networking.istio.io/v1/namespaces/{namespace}/workloadentries");
        let what = what();
        let url = if what.ends_with("Put") { format!("{url}/{name}") } else { url };
        Err(Status::new(code::UNKNOWN, format!("{what} {url:?}: dial tcp 10.96.0.1:443: connect: connection refused")))
    }

    /// The race between istiod's own writes, ordered or in its window.
    fn api_conflict(&self, key: &Key, entry: Option<&WorkloadEntry>) -> Result<(), Status> {
        let window = self.faults.find(|f| if let Fault::ConflictWindow(w) = f { Some(*w) } else { None });
        let since =
            entry.and_then(|e| humantime::parse_rfc3339(e.disconnected_at()?).ok()).and_then(|at| at.elapsed().ok());
        let raced = window.zip(since).is_some_and(|(window, since)| since < window);
        if !raced && !self.faults.conflict() {
            return Ok(());
        }
        let (namespace, name) = key;
        Err(Status::new(
            code::UNKNOWN,
            format!(
                "failed updating WorkloadEntry {namespace}/{name} err: Operation cannot be fulfilled on workloadentries.networking.istio.io {name:?}: \
                 the object has been modified; please apply your changes to the latest version and try again"
            ),
        ))
    }
}

fn name_of(key: &Key) -> String {
    format!("{}/{}", key.0, key.1)
}

/// `<group>-<ip>[-<network>]`, colons as hyphens, the last 253 characters.
pub(crate) fn entry_name(group: &str, node: &Node) -> String {
    let mut name = format!("{group}-{}", node.address.replace(':', "-"));
    if !node.network.is_empty() {
        name = format!("{name}-{}", node.network);
    }
    let cut = name.len().saturating_sub(253);
    name.get(cut..).unwrap_or(&name).to_owned()
}

/// Whether this identity may have that entry. An empty account lets any of the namespace.
fn verify(namespace: &str, account: &str, identity: &Identity) -> Result<(), Status> {
    if identity.namespace != namespace {
        let text =
            format!("registration of WorkloadEntry namespace mismatch: {:?} vs {namespace:?}", identity.namespace);
        return Err(Status::new(code::UNKNOWN, text));
    }
    if !account.is_empty() && identity.account != account {
        let text =
            format!("registration of WorkloadEntry service account mismatch: {:?} vs {account:?}", identity.account);
        return Err(Status::new(code::UNKNOWN, text));
    }
    Ok(())
}

/// The API server's syntax checks, with its texts.
fn valid(entry: &WorkloadEntry) -> Result<(), String> {
    let alphanumeric = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let part_ok = |p: &str| {
        p.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            && alphanumeric(p.chars().next())
            && alphanumeric(p.chars().last())
    };
    if !entry.name.split('.').all(part_ok) {
        return Err(format!(
            "metadata.name: Invalid value: {:?}: a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start \
             and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
             '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')",
            entry.name
        ));
    }
    let value_ok = |v: &str| {
        v.is_empty()
            || v.len() <= 63
                && v.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && alphanumeric(v.chars().next())
                && alphanumeric(v.chars().last())
    };
    match entry.labels.values().find(|v| !value_ok(v)) {
        Some(value) => Err(format!(
            "metadata.labels: Invalid value: {value:?}: a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must \
             start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is \
             '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
        )),
        None => Ok(()),
    }
}
