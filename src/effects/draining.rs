//! The connections of backends, and the wait until those that are out of service have
//! none.

use std::cell::RefCell;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use schemars::JsonSchema;
use serde::Serialize;

use super::conntrack::{Leaving, Listed, RemovedBackend, each, number, removed};
use crate::host::Host;
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{ConntrackEntry, Family};
use crate::plan::Plan;
use crate::request::{Request, Service};

/// The connections that a backend has left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Remaining {
    /// Its balancer, in a set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balancer: Option<String>,
    /// Its address.
    pub address: IpAddr,
    /// Its port. Left out where connections keep the port that they were addressed to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The number of its connections.
    pub connections: usize,
}

/// Backends whose connections are counted.
#[derive(Debug)]
pub struct Draining(Vec<(Family, Vec<RemovedBackend>)>);

impl Draining {
    /// The backends of weight 0, and those that are held or were removed: the observed
    /// rules name them, and they get no new connections.
    #[must_use]
    pub fn new<'a>(
        request: &Request,
        plan: &Plan,
        before: impl Iterator<Item = (Family, &'a Ruleset)>,
    ) -> Self {
        Self::of(&[Service::Drained, Service::Held], request, plan, before)
    }

    /// The backends that the observed rules name and that have one of these places, or
    /// are not planned.
    #[must_use]
    pub fn of<'a>(
        places: &[Service],
        request: &Request,
        plan: &Plan,
        before: impl Iterator<Item = (Family, &'a Ruleset)>,
    ) -> Self {
        let of_family = |(family, before): (Family, &Ruleset)| {
            let leaving = Leaving::new(request, family, places).or_had_left();
            let backends = removed(plan, family, before, &leaving, &|_, _| true);
            (family, backends)
        };
        Self(before.map(of_family).collect())
    }

    /// Waits until none of them has a connection, at most that long. Returns the
    /// connections that are left.
    ///
    /// # Errors
    /// When the kernel does not list connections.
    pub fn wait(&self, host: &impl Host, longest: Duration) -> Result<Vec<Remaining>> {
        const INTERVAL: Duration = Duration::from_millis(200);
        let deadline = Instant::now() + longest;
        loop {
            let remaining = self.remaining(host)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if remaining.is_empty() || left.is_zero() {
                return Ok(remaining);
            }
            thread::sleep(INTERVAL.min(left));
        }
    }

    /// The connections of each backend that has some.
    ///
    /// # Errors
    /// When the kernel does not list connections.
    pub fn remaining(&self, host: &impl Host) -> Result<Vec<Remaining>> {
        let mut remaining = Vec::new();
        for (family, backends) in self.0.iter().filter(|(_, backends)| !backends.is_empty()) {
            let open = RefCell::new(vec![Vec::new(); backends.len()]);
            each(host, *family, backends, Listed::Seen, &|entry, owner| {
                if !entry.is_closed {
                    open.borrow_mut()[owner].push(Ends::of(entry));
                }
            })?;
            let counted = backends.iter().zip(open.into_inner());
            let counted = counted.map(|(backend, open)| Remaining {
                balancer: backend.balancer.clone(),
                address: backend.endpoint.address,
                port: backend.endpoint.port,
                connections: distinct(open),
            });
            remaining.extend(counted.filter(|backend| backend.connections > 0));
        }
        Ok(remaining)
    }
}

/// The ends of a connection of one backend, in a form that is compared fast.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Ends {
    source: u128,
    destination: u128,
    /// The ports of the source, of the destination, and of the backend.
    ports: [u16; 3],
}

impl Ends {
    fn of(entry: &ConntrackEntry) -> Self {
        Self {
            source: number(entry.source),
            destination: number(entry.destination),
            ports: [entry.source_port, entry.port, entry.reply_source.1],
        }
    }
}

/// The number of connections; the kernel's list may have some of them twice.
fn distinct(mut all: Vec<Ends>) -> usize {
    all.sort_unstable();
    all.dedup();
    all.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_is_listed_twice_counts_once() {
        let entry = |client: u8, source_port, port| ConntrackEntry {
            protocol: 17,
            source: [10, 8, 0, client].into(),
            source_port,
            destination: [10, 8, 0, 1].into(),
            port,
            reply_source: ([10, 9, 0, 1].into(), 53),
            is_closed: false,
        };
        let one = entry(2, 4000, 53);
        let count = |entries: &[ConntrackEntry]| distinct(entries.iter().map(Ends::of).collect());
        assert_eq!(count(&[one, one]), 1);
        for other in [entry(3, 4000, 53), entry(2, 4001, 53), entry(2, 4000, 54)] {
            assert_eq!(count(&[one, other, one]), 2, "{other:?}");
        }
        let mut other = one;
        other.reply_source.1 = 54;
        assert_eq!(count(&[one, other]), 2);
        other = one;
        other.destination = [10, 8, 0, 9].into();
        assert_eq!(count(&[one, other]), 2);
    }
}
