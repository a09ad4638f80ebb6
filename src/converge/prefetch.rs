//! The dumps that are started before the request is checked.
//!
//! Most runs find nothing to do, and `iptables-save` takes most of their time.
//! So it works while the request is validated and planned
//! (`benches/program.py`, `benches/noop.py`).

use std::collections::BTreeMap;

use anyhow::Result;

use crate::host::{Host, PendingRead, Query, Scope};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Family, Name, Table};

/// Dumps of the nat table, by family; a failed one gives its error to the first
/// who asks.
#[derive(Default)]
pub struct Prefetch(BTreeMap<Family, Result<Ruleset>>);

impl Prefetch {
    const SCOPE: Scope = Scope::Only(Table::Nat);

    /// Starts the dumps of all families that the host supports.
    #[must_use]
    pub fn begin<'a>(host: &'a impl Host, name: &'a Name) -> PendingPrefetch<'a> {
        let families = Family::BOTH.into_iter();
        let families: Vec<_> = families.filter(|family| host.supports(*family)).collect();
        let query = |family: &Family| Query {
            family: *family,
            scope: Self::SCOPE,
            counters: false,
        };
        let queries = families.iter().map(query).collect();
        PendingPrefetch {
            read: host.begin_read(name, queries),
            families,
        }
    }

    /// Takes the dump that answers the query, once.
    pub(crate) fn take(&mut self, query: Query) -> Option<Result<Ruleset>> {
        (query.scope == Self::SCOPE && !query.counters).then(|| self.0.remove(&query.family))?
    }
}

/// Dumps that are under way.
pub struct PendingPrefetch<'a> {
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
        Prefetch(self.families.into_iter().zip(rulesets).collect())
    }
}
