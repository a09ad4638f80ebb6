//! Brings the host to what is planned: read, compare, stop or write, read
//! again, and undo when that does not show what was planned.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

use anyhow::Result;

use crate::change::{Change, applied};
use crate::diff;
use crate::host::{Host, Look, Scope, Variant};
use crate::net::{Family, Table};
use crate::plan::Plan;
use crate::request::{Request, Wanted};
use crate::restore;
use crate::ruleset::Ruleset;

/// What a balancer owns on a host, by family.
pub type State = BTreeMap<Family, Arc<Ruleset>>;

/// Whether changes are made or only foretold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Made.
    Apply,
    /// Foretold.
    Check,
}

/// What came of a run that could read the host.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which iptables was worked on.
    pub variant: Variant,
    /// What was there.
    pub before: State,
    /// What is there now, or in a check what would be.
    pub after: State,
    /// What was changed, or in a check what would be, in order. After a
    /// failure that was undone there is none.
    pub changes: Vec<Change>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Why it failed, and in what state the host is.
    pub failure: Option<String>,
}

impl Outcome {
    /// The version of iptables, as far as a dump has named it.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        let mut states = self.after.values().chain(self.before.values());
        states.find_map(|ruleset| ruleset.version.as_deref())
    }
}

/// Does what the request asks for.
///
/// # Errors
/// When the host cannot be read. Nothing has been changed then; what fails
/// later is in the [`Outcome`].
pub fn converge(host: &impl Host, request: &Request, run: Run) -> Result<Outcome> {
    let plan = Plan::new(request);
    let mut before = read(host, request, &plan, Counters::Left)?;
    let mut changes = missing(&plan, &before);
    let _lock = match run {
        Run::Apply if !changes.is_empty() => Some(host.lock()?),
        Run::Apply | Run::Check => None,
    };
    if !changes.is_empty() {
        before = read(host, request, &plan, Counters::Taken)?;
        changes = missing(&plan, &before);
    }
    let foretold = |(family, found): (&Family, &Arc<Ruleset>)| {
        let untouched = !changes.iter().any(|change| change.family == *family);
        let after = if untouched {
            found.clone()
        } else {
            applied(&changes, *family, found).into()
        };
        (*family, after)
    };
    let mut outcome = Outcome {
        variant: host.variant(),
        after: before.iter().map(foretold).collect(),
        warnings: warnings(host, &before),
        before,
        changes,
        failure: None,
    };
    if run == Run::Check || outcome.changes.is_empty() {
        return Ok(outcome);
    }
    if let Err(error) = carry_out(host, request, &plan, &outcome) {
        let undone = undo(host, request, &plan, &mut outcome);
        outcome.failure = Some(format!("{error:#}; {undone}"));
    }
    Ok(outcome)
}

fn warnings(host: &impl Host, found: &State) -> Vec<String> {
    let other = host.variant().other().as_str();
    let mixed = host.other_variant_in_use().then(|| {
        format!(
            "there are rules of iptables-{other} too; both variants act on every packet, one after the other, \
             and a balancer made there is only found with `variant: {other}`"
        )
    });
    let unreadable = found.iter().flat_map(|(family, ruleset)| {
        let title = family.title();
        let tables = ruleset.unreadable.iter();
        tables.map(move |table| format!("{title} table `{table}` was made by `nft` in a way that iptables cannot show; it was left alone"))
    });
    mixed.into_iter().chain(unreadable).collect()
}

/// The changes that the plan still calls for.
fn missing(plan: &Plan, found: &State) -> Vec<Change> {
    let in_family = |(family, found): (&Family, &Arc<Ruleset>)| diff::to_plan(plan, *family, found);
    found.iter().flat_map(in_family).collect()
}

/// Counters are read only before something is changed that has some: the usual
/// run finds nothing to do.
#[derive(Clone, Copy, PartialEq)]
enum Counters {
    Left,
    Taken,
}

/// Every family that is planned for, and every other that the host has
/// programs for, since something may be left there from before.
fn read(host: &impl Host, request: &Request, plan: &Plan, counters: Counters) -> Result<State> {
    let scope = match request.wanted {
        Wanted::Absent => Scope::All,
        Wanted::Present(_) => Scope::Nat,
    };
    let look = Look {
        name: &request.name,
        scope,
        counters: counters == Counters::Taken,
    };
    let families = Family::BOTH
        .into_iter()
        .filter(|family| plan.uses(*family) || host.supports(*family));
    thread::scope(|threads| {
        let readers: Vec<_> = families
            .map(|family| (family, threads.spawn(move || host.read(family, look))))
            .collect();
        let finished = readers.into_iter().map(|(family, reader)| {
            let read = reader
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("reading the host panicked")));
            Ok((family, readable(read?, family, scope, plan)?.into()))
        });
        finished.collect()
    })
}

/// A nat table that cannot be shown is not an empty one, where it matters.
fn readable(found: Ruleset, family: Family, scope: Scope, plan: &Plan) -> Result<Ruleset> {
    let matters = plan.uses(family) || scope == Scope::All;
    if matters && found.hides(Table::Nat) {
        anyhow::bail!(
            "the {} table `nat` has rules that `nft` made and iptables cannot show; \
             remove them with `nft`, or give them a table of their own",
            family.title()
        );
    }
    Ok(found)
}

/// Writes, reads again, and compares: what is found decides.
fn carry_out(host: &impl Host, request: &Request, plan: &Plan, outcome: &Outcome) -> Result<()> {
    write(host, &outcome.changes, &outcome.before)?;
    let missing = missing(plan, &read(host, request, plan, Counters::Left)?);
    match missing.is_empty() {
        true => Ok(()),
        false => anyhow::bail!(
            "the rules were written, but reading them again shows something else: {} would still be needed",
            listed(&missing)
        ),
    }
}

/// One transaction for each family that has changes.
fn write(host: &impl Host, changes: &[Change], found: &State) -> Result<()> {
    let nothing = Ruleset::default();
    for family in Family::BOTH {
        if let Some(transaction) = restore::transaction(
            changes,
            family,
            found.get(&family).map_or(&nothing, AsRef::as_ref),
        ) {
            host.restore(family, &transaction)?;
        }
    }
    Ok(())
}

/// Puts back what was there. Returns the state of the host as a clause, and
/// corrects the outcome to it.
fn undo(host: &impl Host, request: &Request, plan: &Plan, outcome: &mut Outcome) -> String {
    let look = || read(host, request, plan, Counters::Left);
    let attempt = || -> Result<Vec<Change>> {
        let found = with_origins(look()?, &outcome.after);
        write(host, &back(&outcome.before, &found), &found)?;
        Ok(back(&outcome.before, &look()?))
    };
    match attempt() {
        Ok(left) if left.is_empty() => {
            outcome.changes.clear();
            outcome.after = outcome.before.clone();
            "the host is as before".to_owned()
        }
        Ok(left) => format!("undoing it left this to be done: {}", listed(&left)),
        Err(error) => match look() {
            Ok(found) => format!(
                "undoing it failed too ({error:#}), which leaves this to be done: {}",
                listed(&back(&outcome.before, &found))
            ),
            Err(again) => {
                format!(
                    "undoing it failed too ({error:#}), and what is left cannot be read ({again:#})"
                )
            }
        },
    }
}

/// The changes that lead back.
fn back(before: &State, found: &State) -> Vec<Change> {
    let nothing = Ruleset::default();
    let in_family = |(family, earlier): (&Family, &Arc<Ruleset>)| {
        diff::to_earlier(
            earlier,
            *family,
            found.get(family).map_or(&nothing, AsRef::as_ref),
        )
    };
    before.iter().flat_map(in_family).collect()
}

/// Where a table is as it was to become, it is known which of its rules were
/// written just now: they are not the earlier ones, even if they read the same.
fn with_origins(found: State, foretold: &State) -> State {
    let mark = |(family, ruleset): (Family, Arc<Ruleset>)| {
        let mut ruleset = Arc::unwrap_or_clone(ruleset);
        for (table, owned) in &mut ruleset.tables {
            let known = foretold
                .get(&family)
                .and_then(|foretold| foretold.tables.get(table));
            if let Some(known) = known.filter(|known| known.chains == owned.chains) {
                owned.chains = known.chains.clone();
            }
        }
        (family, ruleset.into())
    };
    found.into_iter().map(mark).collect()
}

/// Changes in a few words each.
fn listed(changes: &[Change]) -> String {
    const MOST: usize = 10;
    let worded = |change: &Change| {
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
    let mut words: Vec<String> = changes.iter().take(MOST).map(worded).collect();
    if changes.len() > MOST {
        words.push(format!("and {} more", changes.len() - MOST));
    }
    words.join(", ")
}
