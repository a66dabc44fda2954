//! we-agent brings a VM or bare-metal host into an Istio mesh, and keeps it there. This page is the map of the code.
//!
//! # Nine words
//!
//! A **bundle** says who a **workload** is and whom it trusts. For each workload three loops run: **identity** keeps a
//! certificate, **health** keeps a verdict on the application, **session** keeps the workload registered. **Control** is
//! what identity and session talk to: sign this request, hold this session. **Publish** is how the certificate leaves
//! the daemon. **Status** is all the facts, read at once. The **lab** (`tests/lab`, a crate of its own that shares no
//! code with this one) is the other end of the wire.
//!
//! Beside the loops, `inbound` answers the mesh for an application that speaks no TLS, on threads that are there only for
//! that.
//!
//! Everything else is a leaf that they stand on (`spiffe`, `yaml`, `text`, `time`, `aside`, `files`, `host`, `systemd`, `command`, `proto`) or the shell around them (`config`,
//! `telemetry`, `admin`, `agent`, `cli`).
//!
//! # The picture
//!
//! ```text
//!  /etc/we-agent/payments/          /etc/we-agent/we-agent.yaml
//!  the five files of istioctl       optional
//!           │                                │
//!        bundle ───────► workload ◄─────── config              parsed once; wrong input never gets further
//!                           │
//!  ═════════════════════════▼═════════════════════════════════ one set of loops per workload; nothing is shared
//!
//!     identity ──Identity──► session ◄──Health── health ◄───► the application
//!      │    │                 │    ▲
//!      │    └──► publish      │    └──Addresses── address
//!      │ files, socket, hooks │
//!      │ sign                 │ session
//!      ▼                      ▼
//!     ┌────────────────────────┐
//!     │        control         │◄────────────────────────────► istiod, or the lab
//!     └────────────────────────┘
//!
//!  ═══════════════════════════════════════════════════════════════════════════════════════════════════════════
//!     Identity   Registration   Membership   Health   Addresses   Publication   Reload    facts, one writer each
//!         └────────────┴────────────┴──────────┴──────────┴────────────┴──────────┘
//!                                   │
//!                                status ───► admin: status, readiness, metrics · sd_notify ───► cli
//! ```
//!
//! # Four ideas
//!
//! - **A workload is a directory and a set of tasks.** In: its bundle in `/etc/we-agent/<name>/`. Out: files in
//!   `/run/we-agent/<name>/`. Kept: its last certificate in `/var/lib/we-agent/<name>/`. Several workloads are several of
//!   these, and a broken one cannot disturb its neighbours.
//! - **A fact has one writer and is a [`tokio::sync::watch`].** A late reader gets the newest value, a slow one skips old
//!   values, and nobody waits for a reader.
//! - **A session is a future.** While it runs, the workload is registered or has asked to be; when it returns, it is not.
//!   The fact cannot outlive the connection.
//! - **The host is a directory.** Every absolute path goes through one [`files::Root`]: `/` in production, a temporary
//!   directory in tests and in the demo.
//!
//! # The rooms
//!
//! Each module below `src/` is a room, and this table is the whole list of who may know whom: a room imports only rooms
//! that stand above it. `tests/it/architecture.rs` reads the table and holds the code to it.
//!
//! | Room | In one sentence | May import |
//! |---|---|---|
//! | `spiffe` | SPIFFE as types: trust domain, id, key, request, certificate, roots; what exists is valid. | – |
//! | `yaml` | YAML that cannot grow, hide or nest for ever, with the place of whatever is wrong. | – |
//! | `text` | What others sent us, fit for a line of ours. | – |
//! | `time` | A wall clock that notices a suspended VM, the beat of all looks, and backoff. | – |
//! | `aside` | What may wait for ever, on a thread: one for each thing that can hang. | – |
//! | `files` | The files of this host: where they are, the one door for those that others write, directories that are switched at once, noticing that one was replaced. | aside |
//! | `host` | The machine and its kernel: who knocks, what names and routes mean, signals, limits, memory. | aside |
//! | `systemd` | The service manager: what it is told and asked, the sockets it keeps, the units it reloads for us. | text, files, host |
//! | `command` | Somebody's command: without a shell, bounded, leaving nothing behind. | text, host |
//! | `proto` | The few messages of CA, ADS and health that we use; generated, checked fresh by a test. | – |
//! | `telemetry` | What the daemon says: journal, text or JSON. | text |
//! | `workload` | The Istio objects that we touch, and what one workload is. | spiffe, proto |
//! | `status` | The vocabulary of facts, and all of them as one report. | spiffe, workload |
//! | `locality` | Where this host stands: given, or asked of the platform. | files, status, time, workload |
//! | `bundle` | A directory becomes a bundle, or every mistake in it. | spiffe, yaml, files, workload |
//! | `address` | The loop that owns the addresses of this host. | status, host, time |
//! | `control` | What we ask of a control plane: `sign` and `session`, answered by istiod. | spiffe, proto, status, files, host, time, workload |
//! | `identity` | The loop that owns the certificate: decide, sign, verify, keep, tell. | spiffe, control, status, aside, files, time, workload |
//! | `health` | The loop that owns the verdict: probes and a threshold. | proto, status, host, command, time, workload |
//! | `session` | The loop that owns the registration: hold a session, resume it. | control, status, files, time |
//! | `publish` | How a certificate leaves the daemon: files, switched at once, a socket, and hooks that tell the programs. | spiffe, text, proto, status, aside, files, host, systemd, command, time |
//! | `inbound` | Mutual TLS for an application that speaks none: who may call, and moving the bytes. | spiffe, status, host, systemd, command, time |
//! | `config` | Our own YAML file: strict, optional, every mistake told with its place. | spiffe, yaml, files, host, systemd, locality, telemetry, workload, publish, inbound |
//! | `admin` | Status on a unix socket, readiness and metrics on loopback, READY and STATUS to systemd. | status, files, systemd, telemetry |
//! | `agent` | Wiring, and the order of starting and stopping; the only room that knows all others. | spiffe, time, aside, files, host, systemd, command, telemetry, workload, status, config, bundle, address, locality, control, identity, health, session, publish, inbound, admin |
//! | `cli` | The words of the command line and the exit statuses. | text, config, bundle, status, aside, files, host, systemd, command, telemetry, admin, agent |
//! | `fuzz` | Every door through which something from outside comes in, by name, for the fuzzer; in no program (feature `fuzz`). | spiffe, files, host, systemd, command, workload, config, bundle, control, identity, health, publish, inbound, admin |
//!
//! # Where to begin
//!
//! To follow one certificate, read `identity`, then `control`; to follow one registration, `session`, then `control`.
//! The vocabulary is in [`status`]. How we read Istio's wire is in the `.proto` files and beside the code that obeys it.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod address;
pub mod admin;
pub mod agent;
mod aside;
pub mod bundle;
pub mod cli;
pub mod command;
pub mod config;
pub mod control;
pub mod files;
#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod health;
pub mod host;
pub mod identity;
pub mod inbound;
pub mod locality;
mod proto;
pub mod publish;
pub mod session;
pub mod spiffe;
pub mod status;
pub mod systemd;
pub mod telemetry;
mod text;
pub mod time;
pub mod workload;
mod yaml;

#[cfg(any(test, feature = "fuzz"))]
#[path = "../tests/it/authority.rs"]
mod authority;
