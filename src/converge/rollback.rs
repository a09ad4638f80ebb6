//! Rolling back: the way from the present state to the state before a run.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::outcome::{HostState, Outcome, Steps};
use super::prefetch::Prefetch;
use super::reconciler::{Counters, Reconciler, without_panic};
use super::retry::{Applied, Attempt};
use crate::diff;
use crate::diff::change::Change;
use crate::effects;
use crate::host::{CannotStart, Host};
use crate::netfilter::Family;
use crate::netfilter::ruleset::Ruleset;

impl<H: Host> Reconciler<'_, H> {
    /// Restores the state before the outcome's steps, or before those of the last
    /// attempt. Returns the state of the host as a clause, and corrects the
    /// outcome to it.
    pub(super) fn roll_back(&self, outcome: &mut Outcome, last: Option<&Attempt>) -> String {
        let rolled_back = patiently(|| self.restore_earlier(outcome, last));
        let found = match patiently(|| self.observe(Prefetch::default(), Counters::Skip)) {
            Ok(found) => found,
            Err(unreadable) => {
                let why = match rolled_back {
                    Ok(()) => " was tried".to_owned(),
                    Err(error) => format!(" failed too ({error:#})"),
                };
                return format!(
                    "undoing it{why}, and what is left cannot be read ({unreadable:#})"
                );
            }
        };
        let left = steps_back(&outcome.before, &found);
        if left.is_empty() {
            outcome.steps = Steps::default();
            outcome.after = outcome.before.clone();
            return "the host is as before".to_owned();
        }
        outcome.after = found;
        match rolled_back {
            Ok(()) => format!("rollback is incomplete, still needed: {}", summary(&left)),
            Err(error) => format!(
                "undoing it failed too ({error:#}); rollback is incomplete, still needed: {}",
                summary(&left)
            ),
        }
    }

    fn restore_earlier(&self, outcome: &Outcome, last: Option<&Attempt>) -> Result<()> {
        let (steps, before) = match last {
            Some(last) => (&last.steps, &last.before),
            None => (&outcome.steps, &outcome.before),
        };
        let predicted = self.state_after(before, steps);
        let found = self.observe(Prefetch::default(), Counters::Read)?;
        let found = with_origins(found, &predicted);
        let back = steps_back(&outcome.before, &found);
        self.write(&back, &found, &mut Applied::default(), &mut || ())
    }
}

/// Repeats what fails because a program could not be started: for a moment the
/// host may have no process or no memory to give.
fn patiently<T>(mut act: impl FnMut() -> Result<T>) -> Result<T> {
    const LONGEST: Duration = Duration::from_secs(5);
    const PAUSE: Duration = Duration::from_millis(50);
    let deadline = Instant::now() + LONGEST;
    loop {
        match without_panic(&mut act) {
            Err(error) if error.is::<CannotStart>() && Instant::now() < deadline => {
                thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

/// The steps that restore the earlier state.
fn steps_back(before: &HostState, found: &HostState) -> Steps {
    let nothing = Ruleset::default();
    let in_family = |(family, earlier): (&Family, &Arc<Ruleset>)| {
        let now = found.rules.get(family).map_or(&nothing, AsRef::as_ref);
        diff::to_earlier(earlier, *family, now)
    };
    Steps {
        changes: diff::joined(before.rules.iter().map(in_family)),
        effects: effects::rollback(&before.settings, &found.settings),
    }
}

/// Marks the rules that this run has written, in every table that is as it was
/// predicted: they are not the earlier ones, even if they read the same.
fn with_origins(found: HostState, predicted: &HostState) -> HostState {
    let mark = |(family, ruleset): (Family, Arc<Ruleset>)| {
        let mut ruleset = Arc::unwrap_or_clone(ruleset);
        for (table, owned) in &mut ruleset.tables {
            let predicted = predicted.rules.get(&family);
            let known = predicted.and_then(|predicted| predicted.tables.get(table));
            let Some(known) = known.filter(|known| known.chains == owned.chains) else {
                continue;
            };
            for (chain, known) in owned.chains.values_mut().zip(known.chains.values()) {
                for (rule, known) in chain.rules.iter_mut().zip(&known.rules) {
                    rule.fresh = known.fresh;
                }
            }
        }
        (family, ruleset.into())
    };
    HostState {
        rules: found.rules.into_iter().map(mark).collect(),
        settings: found.settings,
    }
}

/// The steps in a few words each, ten at most.
pub(super) fn summary(steps: &Steps) -> String {
    const MOST: usize = 10;
    let change = |change: &Change| {
        let place = format!(
            "{} {} {} {}",
            change.family.as_str(),
            change.table.as_str(),
            change.action.kind().as_str(),
            change.chain
        );
        match change.action.rule() {
            Some(rule) => format!("{place} `{}`", rule.shown()),
            None => place,
        }
    };
    let changes = steps.changes.iter().map(change);
    let effects = steps
        .effects
        .iter()
        .map(|effect| format!("{} `{}`", effect.kind().as_str(), effect.shown()));
    let mut words: Vec<String> = changes.chain(effects).take(MOST).collect();
    if steps.len() > MOST {
        words.push(format!("and {} more", steps.len() - MOST));
    }
    words.join(", ")
}
