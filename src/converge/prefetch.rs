//! The dumps that are started before the request is checked.
//!
//! Most runs find nothing to do, and `iptables-save` takes most of their time.
//! So it works while the request is validated and planned
//! (`benches/program.py`, `benches/noop.py`).

use std::collections::BTreeMap;

use anyhow::Result;

use crate::host::{Host, PendingRead, Query, Scope};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Family, Name};

/// Dumps by family; a failed one gives its error to the first who asks.
#[derive(Default)]
pub struct Prefetch {
    /// The tables that were read; `None` when nothing was.
    scope: Option<Scope>,
    /// The number of changes before, if it was asked for, and the dumps have counters.
    generation: Option<u32>,
    dumps: BTreeMap<Family, Result<Ruleset>>,
}

impl Prefetch {
    /// Starts the dumps of all families that the host supports. With counters they
    /// need not be read again before a change, where the host counts changes.
    #[must_use]
    pub fn begin<'a>(
        host: &'a impl Host,
        name: &'a Name,
        scope: Scope,
        with_counters: bool,
    ) -> PendingPrefetch<'a> {
        let generation = with_counters.then(|| host.generation()).flatten();
        let families = Family::BOTH.into_iter();
        let families: Vec<_> = families.filter(|family| host.supports(*family)).collect();
        let query = |family: &Family| Query {
            family: *family,
            scope,
            counters: generation.is_some(),
        };
        let queries = families.iter().map(query).collect();
        PendingPrefetch {
            scope,
            generation,
            read: host.begin_read(name, queries),
            families,
        }
    }

    /// Takes the dump that answers the query, once.
    pub(crate) fn take(&mut self, query: Query) -> Option<Result<Ruleset>> {
        let answers =
            self.scope == Some(query.scope) && (!query.counters || self.generation.is_some());
        answers.then(|| self.dumps.remove(&query.family))?
    }

    /// The number of changes before dumps that have counters.
    #[must_use]
    pub fn generation(&self) -> Option<u32> {
        self.generation
    }

    /// The tables that were read of a family; `None` when nothing was.
    pub(crate) fn scope(&self, family: Family) -> Option<Scope> {
        self.scope.filter(|_| self.dumps.contains_key(&family))
    }
}

/// Dumps that are under way.
pub struct PendingPrefetch<'a> {
    scope: Scope,
    generation: Option<u32>,
    read: Box<dyn PendingRead + 'a>,
    families: Vec<Family>,
}

impl PendingPrefetch<'_> {
    /// Returns true when nothing is left to wait for.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.read.is_ready()
    }

    /// Waits for all dumps.
    #[must_use]
    pub fn finish(self) -> Prefetch {
        let rulesets = self.read.finish();
        Prefetch {
            scope: Some(self.scope),
            generation: self.generation,
            dumps: self.families.into_iter().zip(rulesets).collect(),
        }
    }
}
