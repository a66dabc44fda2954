//! The agent's socket beside its files.
#![allow(clippy::unwrap_used)]

use crate::{
    published,
    rotation::{host, lab},
};
use std::os::unix::fs::PermissionsExt as _;

const ALSO: &str = "/run/secrets/workload-spiffe-uds/socket";

#[tokio::test]
async fn files_and_socket_share_a_directory_that_can_be_passed_while_keys_cannot_be_reached() {
    let lab = lab().spawn().await.unwrap();
    let host = host(&lab).config(&format!("workloads: {{payments: {{socket: {{also: [{ALSO}]}}}}}}\n"));
    let mut agent = host.start().await;
    let both = agent.until("payments", "published twice", |w| {
        let files: Vec<_> = w.files.iter().filter(|p| p.serial == w.identity.serial).collect();
        w.ready
            && ["files", "socket", &format!("socket {ALSO}")]
                .iter()
                .all(|name| files.iter().any(|p| p.publisher == *name))
    });
    assert!(both.await.files.iter().all(|p| p.cause.is_none()));
    let dir = published::dir(&host, "payments");
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir) & 0o011, 0o011, "others could not reach the socket: mode {:o}", mode(&dir));
    assert_eq!(mode(&dir.join("agent.sock")), 0o660);
    assert_eq!(mode(&host.path("/run/secrets/workload-spiffe-uds/socket")), 0o660);
    assert_eq!((mode(&dir.join("..data")), mode(&dir.join("key.pem"))), (0o700, 0o600));
    agent.stop().await;
}
