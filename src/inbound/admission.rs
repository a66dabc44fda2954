//! Who may be in a handshake. Half-open connections cost memory, and whoever opens many must not keep others out: at the
//! bound, the oldest of the address with the most gives way. Of IPv6, whoever has one address has a network of them.

use std::{
    cmp::Reverse,
    collections::{HashMap, VecDeque},
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::oneshot;

/// The handshakes in flight of one listener.
#[derive(Debug, Clone)]
pub(super) struct Admission {
    most: usize,
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    count: usize,
    next: u64,
    by_address: HashMap<IpAddr, VecDeque<(u64, oneshot::Sender<()>)>>,
}

/// A handshake's place; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Ticket {
    table: Arc<Mutex<Table>>,
    address: IpAddr,
    number: u64,
    evicted: oneshot::Receiver<()>,
}

impl Admission {
    /// For at most so many at once.
    pub(super) fn new(most: usize) -> Self {
        Self { most: most.max(1), table: Arc::default() }
    }

    /// Ends a handshake, so that there is room for another connection; false when none is in flight.
    pub(super) fn evict(&self) -> bool {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).evict()
    }

    /// A place, always; somebody else may lose theirs.
    pub(super) fn enter(&self, address: IpAddr) -> Ticket {
        let address = origin(address);
        let (sender, evicted) = oneshot::channel();
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let number = table.next;
        table.next += 1;
        table.count += 1;
        table.by_address.entry(address).or_default().push_back((number, sender));
        // Who comes counts, too: else, where each has one, whoever comes twice would cost another the place.
        if table.count > self.most {
            table.evict();
        }
        Ticket { table: self.table.clone(), address, number, evicted }
    }
}

/// What one host has at least: an address, and of IPv6 a /64.
fn origin(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 64))),
        ip => ip,
    }
}

impl Table {
    /// Ends the oldest handshake of the address with the most, if there is any; of those with as many, the oldest of all.
    fn evict(&mut self) -> bool {
        let each = self.by_address.iter().filter_map(|(at, held)| Some((held.len(), Reverse(held.front()?.0), *at)));
        let oldest = each.max().map(|(_, Reverse(number), address)| (address, number));
        let Some(sender) = oldest.and_then(|(address, number)| self.remove(address, number)) else { return false };
        let _ = sender.send(()); // it may have ended by itself just now
        true
    }

    fn remove(&mut self, address: IpAddr, number: u64) -> Option<oneshot::Sender<()>> {
        let tickets = self.by_address.get_mut(&address)?;
        let at = tickets.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        let (_, sender) = tickets.remove(at)?;
        if tickets.is_empty() {
            self.by_address.remove(&address);
        }
        self.count -= 1;
        Some(sender)
    }
}

impl Ticket {
    /// Gives the place back, if it was not lost.
    pub(super) fn give_back(self) -> bool {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.remove(self.address, self.number).is_some()
    }

    /// Returns when the place is lost.
    pub(super) async fn evicted(&mut self) {
        let _ = (&mut self.evicted).await;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).remove(self.address, self.number);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn lost(ticket: &mut Ticket) -> bool {
        ticket.evicted.try_recv().is_ok()
    }

    #[test]
    fn who_has_a_network_counts_once() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let admission = Admission::new(4);
        let [mut honest, mut old] = ["2001:db8:0:2::1", "::ffff:10.0.0.1"].map(|text| admission.enter(ip(text)));
        let other = admission.enter(ip("::ffff:10.0.0.2"));
        let mut held: Vec<_> = (0..100).map(|n| admission.enter(ip(&format!("2001:db8:0:1::{n:x}")))).collect();
        assert!(!lost(&mut honest) && !lost(&mut old));
        assert_eq!(held.iter_mut().map(lost).filter(|lost| !lost).count(), 1);
        drop((held, other));
        assert_eq!(origin(ip("10.0.0.1")), origin(ip("::ffff:10.0.0.1")));
        assert_ne!(origin(ip("10.0.0.1")), origin(ip("10.0.0.2")));
    }

    #[test]
    fn the_oldest_of_the_busiest_gives_way() {
        let [busy, quiet, other] = [1, 2, 3].map(|n| IpAddr::from([10, 0, 0, n]));
        let admission = Admission::new(4);
        let mut honest = admission.enter(quiet);
        let mut held: Vec<_> = (0..3).map(|_| admission.enter(busy)).collect();
        let mut late = admission.enter(other);
        assert!(lost(&mut held.remove(0)) && !lost(&mut held[0]));
        for _ in 0..100 {
            held.push(admission.enter(busy));
        }
        assert!(!lost(&mut honest) && !lost(&mut late));
        assert_eq!(held.iter_mut().map(lost).filter(|lost| !lost).count(), 2);
        assert!(admission.evict() && lost(&mut held[100]) && !lost(&mut honest));
        // The last one has its place, that one has lost it.
        assert!(held.pop().is_some_and(Ticket::give_back) && !held.swap_remove(100).give_back());
        drop(held);
        drop((honest, late));
        assert!(!admission.evict());
        let table = admission.table.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(table.count == 0 && table.by_address.is_empty());
    }
}
