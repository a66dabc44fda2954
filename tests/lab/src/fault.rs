//! What the lab does wrong on request.

use std::{
    mem::{Discriminant, discriminant},
    str::FromStr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Something the control plane does wrong from the moment it is injected until it is healed.
/// On the command line the names are kebab-case, a value follows `=`: `ca-down`, `short-life=3s`, `conflict=2`.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// Every signing request is answered 14.
    CaDown,
    /// Signing requests are never answered.
    CaHangs,
    /// Signing requests are answered with this gRPC code.
    CaRefuses(i32),
    /// Certificates carry somebody else's SPIFFE ID.
    WrongIdentity,
    /// Certificates are for a key that is not the caller's.
    WrongKey,
    /// Answers have one element: the leaf, without its issuers and root.
    ShortChain,
    /// Answers have the elements of another release, or of an operator's odd files.
    Chain(Shape),
    /// Certificates live this long, whatever was asked: istiod shortens without a word.
    ShortLife(Duration),
    /// Every token is refused with 16.
    RefuseToken,
    /// Certificates issued from now on are refused in the handshake (`unknown_ca`), older ones are not:
    /// istiod after a live change of its CA.
    RefuseNewCertificate,
    /// Refused client certificates see a completed handshake and then the end of the connection, no alert.
    LoseAlerts,
    /// The API server is away: good tokens get 16 after this long, registrations 2, health reports are lost,
    /// what has a certificate already keeps renewing.
    ApiServerDown(Duration),
    /// Ends every ADS stream now (RST_STREAM). Happens once.
    DropStreams,
    /// Cuts every connection now, without GOAWAY or trailers. Happens once; the port stays open.
    DropConnections,
    /// Health reports are written this late, and not at all if their stream has ended by then: a close overtakes them.
    SlowReports(Duration),
    /// This many health reports are lost, as all are: nobody is told.
    LoseReports(u32),
    /// Endpoints are pushed again and again, though nothing has changed.
    Flood,
    /// This many registrations are refused with the API server's write conflict.
    Conflict(u32),
    /// A registration within this time of its entry's disconnect meets the write conflict: istiod's own race.
    ConflictWindow(Duration),
    /// Registrations find no WorkloadGroup.
    NoGroup,
    /// Streams are refused with this gRPC code, before their first request is looked at.
    RefuseStreams(i32),
    /// So many new streams a second are admitted; who would wait longer than a second gets 8.
    Admission(f64),
    /// Streams wait this long before they are looked at.
    SlowAdmission(Duration),
    /// Tells every connection to go away, as ageing does: twice, then a bare close after the age grace. Happens once.
    Goaway,
    /// Streams are taken and never answered, and nothing is registered.
    Silent,
    /// Answers about clusters are this many MiB large.
    ObserverTooBig(usize),
    /// The serving certificate is of another name.
    WrongServerName,
    /// The serving certificate is of another CA.
    WrongServerRoot,
    /// The port is closed and every connection cut, as by a kill. [`Lab::heal`](crate::Lab::heal) brings it up again.
    Down,
}

/// The elements of an answer after the leaf, as they have also been seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// All intermediates in one element (up to 1.25.0).
    Concatenated,
    /// Each root an element of its own (1.25.1).
    SplitRoots,
    /// The bundle of roots twice: the operator's chain file ends in the root.
    RootTwice,
}

/// The faults in force.
#[derive(Debug, Default)]
pub(crate) struct Faults(Mutex<Vec<Fault>>);

impl Faults {
    pub(crate) fn inject(&self, fault: Fault) {
        let mut faults = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        faults.retain(|f| discriminant(f) != discriminant(&fault));
        faults.push(fault);
    }

    pub(crate) fn heal(&self, kind: Discriminant<Fault>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|f| discriminant(f) != kind);
    }

    pub(crate) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// What `pick` makes of the first fault that it knows.
    pub(crate) fn find<T>(&self, pick: impl Fn(&Fault) -> Option<T>) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().find_map(pick)
    }

    pub(crate) fn has(&self, fault: Fault) -> bool {
        self.find(|f| (*f == fault).then_some(())).is_some()
    }

    /// Uses up one of the conflicts that were ordered.
    pub(crate) fn conflict(&self) -> bool {
        self.use_up(|fault| if let Fault::Conflict(left) = fault { Some(left) } else { None })
    }

    /// Uses up one of the reports that are to be lost.
    pub(crate) fn lose_report(&self) -> bool {
        self.use_up(|fault| if let Fault::LoseReports(left) = fault { Some(left) } else { None })
    }

    fn use_up(&self, count: impl Fn(&mut Fault) -> Option<&mut u32>) -> bool {
        let mut faults = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match faults.iter_mut().find_map(count) {
            Some(left @ 1..) => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }
}

/// A fault's name or value that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no fault; one of {names}, some with a value as in short-life=3s, conflict=2, admission=1.5", names = NAMES.join(" "))]
pub struct UnknownFault(String);

const NAMES: [&str; 29] = [
    "ca-down",
    "ca-hangs",
    "ca-refuses=CODE",
    "wrong-identity",
    "wrong-key",
    "short-chain",
    "chain=concatenated|split-roots|root-twice",
    "short-life=TIME",
    "refuse-token",
    "refuse-new-certificate",
    "lose-alerts",
    "api-server-down[=TIME]",
    "drop-streams",
    "drop-connections",
    "slow-reports=TIME",
    "lose-reports=N",
    "flood",
    "conflict=N",
    "conflict-window=TIME",
    "no-group",
    "refuse-streams=CODE",
    "admission=N",
    "slow-admission=TIME",
    "goaway",
    "silent",
    "observer-too-big=MIB",
    "wrong-server-name",
    "wrong-server-root",
    "down",
];

impl FromStr for Fault {
    type Err = UnknownFault;

    fn from_str(text: &str) -> Result<Self, UnknownFault> {
        let unknown = || UnknownFault(text.to_owned());
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let time = || value.and_then(|v| humantime::parse_duration(v).ok()).ok_or_else(unknown);
        let number = || value.and_then(|v| v.parse().ok()).ok_or_else(unknown);
        Ok(match name.replace('_', "-").as_str() {
            "ca-down" => Self::CaDown,
            "ca-hangs" => Self::CaHangs,
            "ca-refuses" => Self::CaRefuses(number()?),
            "wrong-identity" => Self::WrongIdentity,
            "wrong-key" => Self::WrongKey,
            "short-chain" => Self::ShortChain,
            "chain" => Self::Chain(match value.map(|v| v.replace('_', "-")).as_deref() {
                Some("concatenated") => Shape::Concatenated,
                Some("split-roots") => Shape::SplitRoots,
                Some("root-twice") => Shape::RootTwice,
                _ => return Err(unknown()),
            }),
            "short-life" => Self::ShortLife(time()?),
            "refuse-token" => Self::RefuseToken,
            "refuse-new-certificate" => Self::RefuseNewCertificate,
            "lose-alerts" => Self::LoseAlerts,
            "api-server-down" => Self::ApiServerDown(if value.is_some() { time()? } else { Duration::ZERO }),
            "drop-streams" => Self::DropStreams,
            "drop-connections" => Self::DropConnections,
            "slow-reports" => Self::SlowReports(time()?),
            "lose-reports" => Self::LoseReports(number()?.unsigned_abs()),
            "flood" => Self::Flood,
            "conflict" => Self::Conflict(number()?.unsigned_abs()),
            "conflict-window" => Self::ConflictWindow(time()?),
            "no-group" => Self::NoGroup,
            "refuse-streams" => Self::RefuseStreams(number()?),
            "admission" => {
                Self::Admission(value.and_then(|v| v.parse().ok()).filter(|n: &f64| *n > 0.0).ok_or_else(unknown)?)
            }
            "slow-admission" => Self::SlowAdmission(time()?),
            "goaway" => Self::Goaway,
            "silent" => Self::Silent,
            "observer-too-big" => Self::ObserverTooBig(number()?.unsigned_abs() as usize),
            "wrong-server-name" => Self::WrongServerName,
            "wrong-server-root" => Self::WrongServerRoot,
            "down" => Self::Down,
            _ => return Err(unknown()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_that_is_offered_is_understood() {
        for name in NAMES {
            let text = name
                .replace("[=TIME]", "")
                .replace("TIME", "3s")
                .replace("CODE", "14")
                .replace("MIB", "9")
                .replace('N', "2");
            let text = text.split('|').next().unwrap_or_default();
            assert!(text.parse::<Fault>().is_ok(), "{text}");
            assert!(text.replace('-', "_").parse::<Fault>().is_ok(), "{text}");
        }
        assert!("conflict".parse::<Fault>().is_err() && "short-life=soon".parse::<Fault>().is_err());
    }
}
