//! The state of a host, the steps between two states, and the outcome of a run.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use crate::diff::change::Change;
use crate::effects::{Effect, HostSettings};
use crate::host::Lock;
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Family, Variant};

/// The balancer's state on a host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostState {
    /// The running rules that are owned, by family.
    pub rules: BTreeMap<Family, Arc<Ruleset>>,
    /// Everything that is not a running rule.
    pub settings: HostSettings,
}

/// Apply changes, or only predict them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunMode {
    /// Changes are made.
    Apply,
    /// Changes are predicted.
    Check,
}

/// Steps that are to be applied, or were applied, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Steps {
    /// Changes of running rules.
    pub changes: Vec<Change>,
    /// Side effects, after all changes of rules.
    pub effects: Vec<Effect>,
}

impl Steps {
    /// The number of steps.
    #[must_use]
    pub fn len(&self) -> usize {
        self.changes.len() + self.effects.len()
    }

    /// Returns true if there is no step.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The outcome of a run that could read the host.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The iptables that was used.
    pub variant: Variant,
    /// The state before the run.
    pub before: HostState,
    /// The state after the run; in check mode the predicted one.
    pub after: HostState,
    /// The steps that were applied; in check mode the predicted ones. None after
    /// a failure that was rolled back.
    pub steps: Steps,
    /// Warnings for the user.
    pub warnings: Vec<String>,
    /// The reason of a failure, and the state in which it left the host.
    pub failure: Option<String>,
    /// The number of attempts at writing: more than one if others wrote too.
    pub attempts: usize,
    /// The lock under which changes were made, so that what belongs to them can be
    /// done before anybody else writes.
    pub lock: Option<Rc<Lock>>,
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
