//! The dumps that are started before the request is checked.
//!
//! Most runs find nothing to do, and `iptables-save` takes most of their time.
//! So it works while the request is validated and planned
//! (`benches/program.py`, `benches/noop.py`).

use std::collections::BTreeMap;
use std::rc::Rc;

use anyhow::Result;

use crate::host::{Host, Lock, PendingRead, Query, Scope};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Family, Name};

/// The reason why a dump is still true when it is to be changed, and need not be read
/// again.
#[derive(Clone, Debug)]
pub enum Proof {
    /// The host counts changes, and this was their number before the dump.
    Generation(u32),
    /// No other run has written since, because the lock was taken before the dump.
    Lock(Rc<Lock>),
}

/// Dumps by family; a failed one gives its error to the first who asks.
#[derive(Default)]
pub struct Prefetch {
    /// The tables that were read; `None` when nothing was.
    scope: Option<Scope>,
    /// With a proof the dumps have counters.
    proof: Option<Proof>,
    dumps: BTreeMap<Family, Result<Ruleset>>,
}

impl Prefetch {
    /// Starts the dumps of all families that the host supports. With a proof they have
    /// counters, and need not be read again before a change.
    #[must_use]
    pub fn begin<'a>(
        host: &'a impl Host,
        name: &'a Name,
        scope: Scope,
        proof: Option<Proof>,
    ) -> PendingPrefetch<'a> {
        let families = Family::BOTH.into_iter();
        let families: Vec<_> = families.filter(|family| host.supports(*family)).collect();
        let query = |family: &Family| Query {
            family: *family,
            scope,
            counters: proof.is_some(),
        };
        let queries = families.iter().map(query).collect();
        PendingPrefetch {
            scope,
            proof,
            read: host.begin_read(name, queries),
            families,
        }
    }

    /// Takes the dump that answers the query, once.
    pub(crate) fn take(&mut self, query: Query) -> Option<Result<Ruleset>> {
        let answers = self.scope == Some(query.scope) && (!query.counters || self.proof.is_some());
        answers.then(|| self.dumps.remove(&query.family))?
    }

    /// The proof that the dumps need not be read again, which have counters then.
    pub(crate) fn proof(&self) -> Option<Proof> {
        self.proof.clone()
    }

    /// The tables that were read of a family; `None` when nothing was.
    pub(crate) fn scope(&self, family: Family) -> Option<Scope> {
        self.scope.filter(|_| self.dumps.contains_key(&family))
    }
}

/// Dumps that are under way.
pub struct PendingPrefetch<'a> {
    scope: Scope,
    proof: Option<Proof>,
    read: Box<dyn PendingRead + 'a>,
    families: Vec<Family>,
}

impl PendingPrefetch<'_> {
    /// Gives up the proof, and with it the lock, before something that may take long:
    /// nobody should wait for the lock meanwhile, and the counters grow old.
    pub fn give_up_proof(&mut self) {
        self.proof = None;
    }

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
            proof: self.proof,
            dumps: self.families.into_iter().zip(rulesets).collect(),
        }
    }
}
