//! The state before and after a run, as text.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;

use super::set::changed_balancers;
use crate::converge::outcome::{HostState, Outcome, Steps};
use crate::effects::{Effect, SavedFile};
use crate::host::forwarding_sysctl;
use crate::netfilter::ruleset::{Chain, OwnedTable};
use crate::netfilter::{Family, Name, Table};
use crate::request::{Request, listed};

/// Before and after, in the shape of Ansible's `--diff`.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Diff {
    pub before: String,
    pub after: String,
    pub before_header: String,
    pub after_header: String,
}

impl Diff {
    /// The state before and after an outcome.
    pub(super) fn new(request: &Request, outcome: &Outcome, steps: &Steps) -> Self {
        let shown = match request.is_set() {
            true => Shown::of_set(&request.name, steps),
            false => Shown::default(),
        };
        Self {
            before: owned_text(&outcome.before, steps, Moment::Before, &shown),
            after: owned_text(&outcome.after, steps, Moment::After, &shown),
            before_header: format!("{} (before)", request.name.as_str()),
            after_header: format!("{} (after)", request.name.as_str()),
        }
    }
}

/// The chains that are shown: all of a balancer, and those of a set that change.
#[derive(Default)]
struct Shown {
    /// `None` for all.
    chains: Option<BTreeMap<(Family, Table), BTreeSet<String>>>,
    /// A summary of the changes that are not shown.
    rest: String,
}

impl Shown {
    /// Of a set with hundreds of balancers the changed chains are shown, of so many
    /// balancers that a person reads them.
    fn of_set(name: &Name, steps: &Steps) -> Self {
        const MOST: usize = 20;
        let changed = changed_balancers(name, steps);
        let balancers: BTreeSet<&str> = changed.keys().copied().take(MOST).collect();
        let own: BTreeSet<&str> = steps
            .changes
            .iter()
            .map(|change| &*change.chain)
            .filter(|chain| name.owns(chain) && name.member(chain).is_none())
            .collect();
        let is_shown = |chain: &str| match name.member(chain) {
            Some(balancer) => balancers.contains(balancer),
            None => own.len() <= MOST || !name.owns(chain) || chain == name.as_str(),
        };
        let mut chains = BTreeMap::<_, BTreeSet<String>>::new();
        for change in &steps.changes {
            let of_table = chains.entry((change.family, change.table)).or_default();
            if is_shown(&change.chain) {
                of_table.insert(change.chain.to_string());
            }
        }
        let mut rest = String::new();
        if own.len() > MOST {
            let name = name.as_str();
            let _ = writeln!(
                rest,
                "# {} chains `{name}//...` that lead to the balancers change too",
                own.len()
            );
        }
        if changed.len() > balancers.len() {
            let others: Vec<&str> = changed.keys().copied().skip(MOST).collect();
            let _ = writeln!(rest, "# changed too: {}", listed(others.into_iter()));
        }
        Self {
            chains: Some(chains),
            rest,
        }
    }

    fn part_of<'a>(&self, place: (Family, Table), owned: &'a OwnedTable) -> Cow<'a, OwnedTable> {
        let Some(chains) = &self.chains else {
            return Cow::Borrowed(owned);
        };
        let nothing = BTreeSet::new();
        let shown = chains.get(&place).unwrap_or(&nothing);
        let named = owned
            .chains
            .iter()
            .filter(|(name, _)| shown.contains(*name));
        let jumps = owned
            .jumps
            .iter()
            .filter(|jump| shown.contains(&jump.chain));
        Cow::Owned(OwnedTable {
            chains: named
                .map(|(name, chain)| (name.clone(), chain.clone()))
                .collect(),
            jumps: jumps.cloned().collect(),
        })
    }
}

/// The side of a diff. Connections exist on the first alone.
#[derive(Clone, Copy, PartialEq)]
enum Moment {
    Before,
    After,
}

/// The owned rules as `iptables-save` prints them, without counters, and every
/// other state that is about to change.
fn owned_text(state: &HostState, steps: &Steps, moment: Moment, shown: &Shown) -> String {
    let mut text = String::new();
    for (family, ruleset) in &state.rules {
        for (table, owned) in &ruleset.tables {
            let head = format!("{} {}", family.as_str(), table.as_str());
            let refused_at = ruleset
                .forward_refuses_at
                .filter(|_| *table == Table::Filter);
            let place = (*family, *table);
            owned_table(&head, &shown.part_of(place, owned), refused_at, &mut text);
        }
    }
    if moment == Moment::After {
        text += &shown.rest;
    }
    for effect in &steps.effects {
        match effect {
            Effect::Forwarding { family, .. } => {
                let on = state.settings.forwarding.get(family) == Some(&true);
                let _ = writeln!(
                    text,
                    "# sysctl\n{} = {}",
                    forwarding_sysctl(*family),
                    u8::from(on)
                );
            }
            Effect::Write { path, .. } => {
                if let Some(file) = state.settings.files.get(path) {
                    file_text(path, file, &mut text);
                }
            }
            Effect::Disconnect(gone) => {
                let shown = match moment {
                    Moment::Before => gone.shown() + "\n",
                    Moment::After => String::new(),
                };
                let _ = write!(text, "# {} connections\n{shown}", gone.family.as_str());
            }
        }
    }
    text
}

/// The owned rules in a file, or the whole text of a file of sysctls.
fn file_text(path: &Path, file: &SavedFile, text: &mut String) {
    let path = path.display();
    match &file.ruleset {
        Some(ruleset) => {
            for (table, owned) in &ruleset.tables {
                owned_table(&format!("{path} {}", table.as_str()), owned, None, text);
            }
        }
        None => {
            let settings = file.text.as_deref().unwrap_or_default();
            let _ = write!(text, "# {path}\n{}", String::from_utf8_lossy(settings));
        }
    }
}

/// One table. A rule of FORWARD after the first that refuses is marked: its
/// position is the only thing that is wrong.
fn owned_table(head: &str, owned: &OwnedTable, refused_at: Option<u32>, text: &mut String) {
    if owned.is_empty() {
        return;
    }
    let chains = owned.chains.keys().map(|name| format!(":{name} - [0:0]"));
    let jumps = owned.jumps.iter();
    let jumps = jumps.map(|lead| {
        let late = lead.chain == "FORWARD" && refused_at.is_some_and(|at| lead.position > at);
        let note = if late {
            "   # after a rule that drops or rejects"
        } else {
            ""
        };
        format!("-A {} {}{note}", lead.chain, lead.rule.shown())
    });
    let in_chain = |(name, chain): (&String, &Chain)| {
        let rules = chain.rules.iter();
        let lines = rules.map(|rule| format!("-A {name} {}", rule.shown()));
        lines.collect::<Vec<_>>()
    };
    let rules = owned.chains.iter().flat_map(in_chain);
    let _ = writeln!(text, "# {head}");
    for line in chains.chain(jumps).chain(rules) {
        let _ = writeln!(text, "{line}");
    }
}
