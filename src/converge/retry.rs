//! Steps that have to be tried again, since others write at the same time.

use std::collections::BTreeSet;
use std::mem;
use std::sync::Arc;

use crate::converge::outcome::{HostState, Steps};
use crate::netfilter::Family;
use crate::netfilter::ruleset::Ruleset;

/// Steps to carry out where there is this.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// What is to be done.
    pub steps: Steps,
    /// What is there.
    pub before: HostState,
}

/// What of the steps of an attempt was carried out.
#[derive(Debug, Default)]
pub struct Done {
    /// The families that were written.
    pub families: BTreeSet<Family>,
    /// How many of the effects there were.
    pub effects: usize,
}

impl Done {
    fn of(&self, mut steps: Steps) -> Steps {
        steps
            .changes
            .retain(|change| self.families.contains(&change.family));
        steps.effects.truncate(self.effects);
        steps
    }
}

/// How it went, where others wrote too.
#[derive(Debug, Default)]
pub struct RetryLog {
    /// The attempts after the first.
    pub further: Vec<Attempt>,
    /// Of each attempt in turn.
    pub done: Vec<Done>,
}

impl RetryLog {
    /// What there was at first and all that was done in the end, with what was
    /// meant to be done last. And the last attempt, if it is not the first.
    #[must_use]
    pub fn told(self, first: Attempt) -> (Attempt, Option<Attempt>) {
        let last = self.further.last().cloned();
        let mut told = first;
        let (mut changes, mut effects) = (Vec::new(), Vec::new());
        for (next, done) in self.further.into_iter().zip(&self.done) {
            let mut earlier = done.of(mem::replace(&mut told.steps, next.steps));
            changes.append(&mut earlier.changes);
            effects.append(&mut earlier.effects);
        }
        told.steps.changes.splice(..0, changes);
        told.steps.effects.splice(..0, effects);
        (told, last)
    }
}

/// Whether a family has neither what it had nor what it was to get.
#[must_use]
pub fn somebody_else_wrote(before: &HostState, after: &HostState, now: &HostState) -> bool {
    let is_odd = |(family, now): (&Family, &Arc<Ruleset>)| {
        let reads_like = |state: &HostState| {
            let rules = state.rules.get(family);
            rules.is_some_and(|rules| rules.reads_like(now))
        };
        !reads_like(before) && !reads_like(after)
    };
    now.rules.iter().any(is_odd)
}
