//! What there is, what there is to do, and what came of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::diff::change::Change;
use crate::effects::{Effect, HostSettings};
use crate::host::Variant;
use crate::netfilter::Family;
use crate::netfilter::ruleset::Ruleset;

/// What a balancer owns on a host, and what it needs of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostState {
    /// The rules that run, by family.
    pub rules: BTreeMap<Family, Arc<Ruleset>>,
    /// All else.
    pub settings: HostSettings,
}

/// Whether changes are made or only foretold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunMode {
    /// Made.
    Apply,
    /// Foretold.
    Check,
}

/// What there is to do, or was done, in order.
#[derive(Clone, Debug, Default)]
pub struct Steps {
    /// To the rules that run.
    pub changes: Vec<Change>,
    /// Side effects.
    pub effects: Vec<Effect>,
}

impl Steps {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.changes.len() + self.effects.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What came of a run that could read the host.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which iptables was worked on.
    pub variant: Variant,
    /// What was there.
    pub before: HostState,
    /// What is there now, or in a check what would be.
    pub after: HostState,
    /// What was changed, or in a check what would be. After a failure that was
    /// undone there is nothing.
    pub steps: Steps,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Why it failed, and in what state the host is.
    pub failure: Option<String>,
    /// How often it was tried: more than once where others wrote too.
    pub attempts: usize,
}

impl Outcome {
    /// The version of iptables, as far as a dump has named it.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        let states = [&self.after, &self.before].into_iter();
        let mut rulesets = states.flat_map(|state| state.rules.values());
        rulesets.find_map(|ruleset| ruleset.version.as_deref())
    }
}
