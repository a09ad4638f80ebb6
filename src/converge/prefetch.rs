//! Reading a host: all that is wanted of it at once, and what is wanted mostly
//! before it is known what is asked for.

use std::collections::BTreeMap;
use std::iter;
use std::sync::Mutex;
use std::thread;

use anyhow::{Result, anyhow};

use crate::host::{Host, PendingRead, Query, Scope};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Family, Table};
use crate::request::Name;

/// Counters are read only before something is changed that has some: the usual
/// run finds nothing to do.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Counters {
    Left,
    Taken,
}

/// What could be read of a host before all was known of the request: what of a
/// balancer is in the nat table of each family, or why that cannot be read.
#[derive(Default)]
pub struct Prefetch(BTreeMap<Family, Result<Ruleset>>);

impl Prefetch {
    const SCOPE: Scope = Scope::Only(Table::Nat);

    /// Begins to look at the host.
    #[must_use]
    pub fn begin<'a>(host: &'a impl Host, name: &'a Name) -> PendingPrefetch<'a> {
        let families = Family::BOTH.into_iter();
        let families = families.filter(|family| host.supports(*family));
        let wanted = families.map(|family| (family, Self::SCOPE)).collect();
        PendingPrefetch(begin(host, name, wanted, Counters::Left))
    }

    /// What was seen of that, once.
    pub(crate) fn take(&mut self, family: Family, scope: Scope) -> Option<Result<Ruleset>> {
        (scope == Self::SCOPE).then(|| self.0.remove(&family))?
    }
}

/// A [`Prefetch`] that is not over yet.
pub struct PendingPrefetch<'a>(Vec<Begun<'a>>);

impl PendingPrefetch<'_> {
    /// Whether there is nothing left to wait for.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.0.iter().all(|(_, _, reading)| reading.is_ready())
    }

    /// Waits for all that is read.
    #[must_use]
    pub fn finish(self) -> Prefetch {
        let read = finish(self.0).into_iter();
        let seen = read.map(|(family, _, ruleset)| (family, ruleset));
        Prefetch(seen.collect())
    }
}

/// What is being read of which family and tables, and what was read.
pub(crate) type Begun<'a> = (Family, Scope, Box<dyn PendingRead + 'a>);
pub(crate) type Read = (Family, Scope, Result<Ruleset>);

/// Begins to read all that at once.
pub(crate) fn begin<'a>(
    host: &'a impl Host,
    name: &'a Name,
    wanted: Vec<(Family, Scope)>,
    counters: Counters,
) -> Vec<Begun<'a>> {
    let look = |scope| Query {
        name,
        scope,
        counters: counters == Counters::Taken,
    };
    wanted
        .into_iter()
        .map(|(family, scope)| (family, scope, host.begin_read(family, look(scope))))
        .collect()
}

/// All at the same time; one after the other where there can be no threads.
pub(crate) fn finish(begun: Vec<Begun<'_>>) -> Vec<Read> {
    let begun: Vec<_> = begun
        .into_iter()
        .map(|(family, scope, reading)| (family, scope, Mutex::new(Some(reading))))
        .collect();
    let read = |reading: &Mutex<Option<Box<dyn PendingRead + '_>>>| {
        let reading = reading.lock().ok().and_then(|mut reading| reading.take());
        reading.map(PendingRead::finish)
    };
    thread::scope(|threads| {
        let others = begun.iter().skip(1);
        let spawned = others.map(|(_, _, reading)| {
            let reader = thread::Builder::new().spawn_scoped(threads, || read(reading));
            reader.ok()
        });
        let readers: Vec<_> = iter::once(None).chain(spawned).collect();
        let all = begun.iter().zip(readers);
        all.map(|((family, scope, reading), reader)| {
            let found = match reader {
                Some(reader) => reader.join().ok().flatten(),
                None => read(reading),
            };
            let panicked = || Err(anyhow!("reading the host panicked"));
            (*family, *scope, found.unwrap_or_else(panicked))
        })
        .collect()
    })
}
