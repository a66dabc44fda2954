//! The settings of one workload.

use super::{allow, files::FilesConfig, hooks, inbound, section::Section, value};
use crate::{
    host::{Account, Allow},
    inbound::Settings as InboundSettings,
    locality::Platform,
    publish::HookSettings,
    spiffe::{KeyKind, TrustDomain},
    workload::{Authority, Locality, Xds},
};
use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

/// What our configuration says of one workload. A value that is given here wins over the bundle; `None` and empty leave
/// it to the bundle.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkloadConfig {
    /// `trustDomain`.
    pub trust_domain: Option<TrustDomain>,
    /// `address`: one or a list, the first is the primary one; empty means: found out (route to the control plane).
    pub address: Vec<IpAddr>,
    /// `clusterId`: the cluster that the control plane knows this workload under.
    pub cluster_id: Option<String>,
    /// `network`: the Istio network that the addresses belong to.
    pub network: Option<String>,
    /// `locality`: `region`, `region/zone` or `region/zone/subzone`; wins over label and platform.
    pub locality: Option<Locality>,
    /// `labels`: added to the bundle's, and winning over them. Of `defaults` and the workload's own, both count.
    pub labels: BTreeMap<String, String>,
    /// `controlPlane`.
    pub control_plane: ControlPlaneConfig,
    /// `identity`, with `renewal.minInterval`.
    pub identity: IdentityConfig,
    /// `health`.
    pub health: HealthConfig,
    /// `membership`.
    pub membership: MembershipConfig,
    /// `files`.
    pub files: FilesConfig,
    /// `socket`.
    pub socket: SocketConfig,
    /// `hooks`, run after each switch of the files.
    pub hooks: Vec<HookSettings>,
    /// `inbound`: where the mesh's mutual TLS ends, in front of an application that speaks none.
    pub inbound: Vec<InboundSettings>,
    /// `platform`.
    pub platform: Platform,
}

/// How the control plane is reached.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ControlPlaneConfig {
    /// `discoveryAddress`, `host:port`.
    pub discovery_address: Option<Authority>,
    /// `caAddress`, `host:port`.
    pub ca_address: Option<Authority>,
    /// `serverName`: the DNS name or IP address that the server's certificate must carry.
    pub server_name: Option<String>,
    /// `xds`.
    pub xds: Xds,
}

/// How the identity is made and renewed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityConfig {
    /// `identity.key`; none leaves it to the bundle, whose default is ECDSA P-256.
    pub key: Option<KeyKind>,
    /// `identity.ttl`: the lifetime that is asked for, at most 90 days; the control plane may give less.
    pub ttl: Option<Duration>,
    /// `identity.removeToken`: whether the token file is removed when it has served (no).
    pub remove_token: bool,
    /// `renewal.minInterval`: the least time between two renewals (10 s), an hour at most.
    pub min_interval: Duration,
}

impl Default for IdentityConfig {
    fn default() -> Self {
        Self { key: None, ttl: None, remove_token: false, min_interval: Duration::from_secs(10) }
    }
}

/// What a probe from the mesh may do here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HealthConfig {
    /// `allowExec`: whether exec probes may run commands on this host (no).
    pub allow_exec: bool,
    /// `verifyTls`: whether HTTPS probes verify the application's certificate (no, as in Kubernetes).
    pub verify_tls: bool,
}

/// The look for the services that select us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MembershipConfig {
    /// `enabled` (yes).
    pub enabled: bool,
    /// `maxBytes`: an answer beyond this is not read, and membership stays unknown (8 MiB).
    pub max_bytes: usize,
}

impl Default for MembershipConfig {
    fn default() -> Self {
        Self { enabled: true, max_bytes: 8 * 1024 * 1024 }
    }
}

/// The socket that programs take the identity from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketConfig {
    /// `enabled` (yes).
    pub enabled: bool,
    /// `group` of the socket, whose members can reach it, so that `allow` can let them in; none stands for the group that
    /// we run as, of which we must be a member.
    pub group: Option<Account>,
    /// `also`: other paths of the socket, absolute (none). The same group and the same `allow` hold there.
    pub also: Vec<PathBuf>,
    /// `allow`: who may connect besides root and our own user (nobody).
    pub allow: Vec<Allow>,
}

impl Default for SocketConfig {
    fn default() -> Self {
        Self { enabled: true, group: None, also: Vec::new(), allow: Vec::new() }
    }
}

impl WorkloadConfig {
    /// Reads what `s` says over what is there already.
    pub(super) fn read(&mut self, s: &mut Section<'_>) {
        s.set_some("trustDomain", value::trust_domain, &mut self.trust_domain);
        s.set_list("address", value::ip, &mut self.address);
        s.set_some("clusterId", value::cluster_id, &mut self.cluster_id);
        s.set_some("network", value::network, &mut self.network);
        s.set_some("locality", value::locality, &mut self.locality);
        s.pairs("labels", |key, text| {
            value::label(key, text)?;
            self.labels.insert(key.to_owned(), text.to_owned());
            Ok(())
        });
        s.set("platform", value::platform, &mut self.platform);
        s.section("controlPlane", |s| {
            let to = &mut self.control_plane;
            s.set_some("discoveryAddress", value::authority, &mut to.discovery_address);
            s.set_some("caAddress", value::authority, &mut to.ca_address);
            s.set_some("serverName", value::server_name, &mut to.server_name);
            s.set("xds", value::xds, &mut to.xds);
        });
        s.section("identity", |s| {
            s.set_some("key", value::key_kind, &mut self.identity.key);
            s.set_some("ttl", value::ttl, &mut self.identity.ttl);
            s.set("removeToken", value::boolean, &mut self.identity.remove_token);
        });
        s.section("renewal", |s| s.set("minInterval", value::up_to(value::HOUR), &mut self.identity.min_interval));
        s.section("health", |s| {
            s.set("allowExec", value::boolean, &mut self.health.allow_exec);
            s.set("verifyTls", value::boolean, &mut self.health.verify_tls);
        });
        s.section("membership", |s| {
            s.set("enabled", value::boolean, &mut self.membership.enabled);
            s.set("maxBytes", value::bytes, &mut self.membership.max_bytes);
        });
        s.section("files", |s| self.files.read(s));
        s.section("socket", |s| {
            s.set("enabled", value::boolean, &mut self.socket.enabled);
            s.set_some("group", allow::account, &mut self.socket.group);
            let also = &mut self.socket.also;
            s.set_list("also", value::socket_path, also);
            if also.iter().enumerate().any(|(i, path)| also.iter().take(i).any(|other| other == path)) {
                s.mistake("has one path twice in also; remove one");
            }
            allow::read(s, &mut self.socket.allow);
        });
        let mut read = Vec::new();
        if s.list("hooks", |s| read.extend(hooks::read(s))) {
            self.hooks = read;
        }
        if !self.hooks.is_empty() && self.files.outputs.is_empty() && !self.files.output_certs {
            s.mistake(
                "has hooks, which run after a switch of the files, and no file: name one in files.outputs, or write \
                 hooks: [] (programs on the socket need no hook)",
            );
        }
        let mut listeners = Vec::new();
        if s.list("inbound", |s| listeners.extend(inbound::read(s))) {
            self.inbound = listeners;
        }
    }
}
