//! What has left the daemon, who takes it, and whether programs were told, as data.

use serde::{Deserialize, Serialize};

states! {
    /// The state of a consumer.
    ConsumerState {
        /// Nothing was sent, for there is no valid certificate; or it has not said yet whether it takes what was sent.
        #[default]
        Waiting = "waiting": Waits,
        /// It uses what it was sent last.
        Current = "current": Good,
        /// It was sent something newer than what it uses, and has not answered.
        Behind = "behind": Waits,
        /// It has refused what it was sent last.
        Refused = "refused": Bad,
    }
}

/// One thing that a program takes from the socket.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConsumerReport {
    /// `sds` or `workload_api`.
    pub protocol: String,
    /// What it takes: a secret (`default`, `ROOTCA`), or the call that it holds (`FetchX509SVID`, `FetchX509Bundles`).
    pub resource: String,
    /// One of [`ConsumerState`].
    pub state: ConsumerState,
    /// Who it says it is; empty when it says nothing.
    pub node: String,
    /// The user that it runs as.
    pub uid: u32,
    /// Its process.
    pub pid: Option<i32>,
    /// The version that it uses: of a certificate the serial number.
    pub version: Option<String>,
    /// Why it has refused.
    pub cause: Option<String>,
}

states! {
    /// The state of a hook.
    ReloadState {
        /// Nothing was switched yet.
        #[default]
        None = "none": Waits,
        /// It runs, or what is served afterwards is being looked at.
        Running = "running": Waits,
        /// The program was told, and where that can be seen, it serves the newest certificate.
        Reloaded = "reloaded": Good,
        /// The hook failed.
        Failed = "failed": Bad,
        /// The hook says that all is well, but the newest certificate is not served.
        Stale = "stale": Bad,
    }
}

/// What one publisher has put out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PublicationReport {
    /// The publisher, say `files`.
    pub publisher: String,
    /// Serial of what consumers see.
    pub serial: Option<String>,
    /// What kind of trouble it is: a stable word.
    #[serde(default)]
    pub kind: Option<String>,
    /// Why the newest is not out.
    pub cause: Option<String>,
}

/// What came of one hook.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ReloadReport {
    /// The unit, or the program that is run.
    pub hook: String,
    /// One of [`ReloadState`].
    pub state: ReloadState,
    /// Serial of the certificate that the program was told of.
    pub serial: Option<String>,
    /// Serial of the certificate that was seen being served; null when nobody looked, or none was seen.
    pub served: Option<String>,
    /// What kind of trouble it is: a stable word.
    #[serde(default)]
    pub kind: Option<String>,
    /// What is wrong, and the fix.
    pub cause: Option<String>,
}
