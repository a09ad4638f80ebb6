//! Changes as data: one value is shown, applied, counted and rolled back.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Serialize;

use crate::netfilter::ruleset::{Chain, JumpRule, OwnedTable, Ruleset, SavedRule};
use crate::netfilter::{Family, Table};

/// One step, in one chain.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The family.
    pub family: Family,
    /// The table.
    pub table: Table,
    /// The chain. Edits of one chain share the name: there may be thousands.
    pub chain: Arc<str>,
    /// The action.
    pub action: Action,
}

/// An action on a chain. Positions count from 1 and hold at the moment of the
/// step.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Creates one of our chains, empty.
    CreateChain,
    /// Appends a rule to a chain.
    Append(SavedRule),
    /// Inserts a rule before the one with that number.
    Insert(u32, SavedRule),
    /// Replaces a rule in an owned chain.
    Replace {
        /// The number of the rule.
        at: u32,
        /// The rule that is replaced.
        before: Box<SavedRule>,
        /// The new rule.
        rule: SavedRule,
    },
    /// Deletes a rule from an owned chain.
    DeleteAt(u32, SavedRule),
    /// Deletes, in a chain that is not ours, the first rule with this text.
    DeleteFirst(SavedRule),
    /// Deletes, in a chain that is not ours, a jump rule that iptables cannot
    /// delete by its text. Only the deletion of chains comes after it.
    DeleteJump(SavedRule),
    /// Deletes one of our chains with its rules.
    DeleteChain,
}

/// The kinds of steps, by the names that results use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Kind {
    CreateChain,
    AppendRule,
    InsertRule,
    ReplaceRule,
    DeleteRule,
    DeleteChain,
    SetSysctl,
    WriteFile,
    DeleteConnections,
}

impl Kind {
    /// `create_chain` and so on.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CreateChain => "create_chain",
            Self::AppendRule => "append_rule",
            Self::InsertRule => "insert_rule",
            Self::ReplaceRule => "replace_rule",
            Self::DeleteRule => "delete_rule",
            Self::DeleteChain => "delete_chain",
            Self::SetSysctl => "set_sysctl",
            Self::WriteFile => "write_file",
            Self::DeleteConnections => "delete_connections",
        }
    }
}

impl Action {
    /// The kind, by the name that results use.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::CreateChain => Kind::CreateChain,
            Self::Append(_) => Kind::AppendRule,
            Self::Insert(..) => Kind::InsertRule,
            Self::Replace { .. } => Kind::ReplaceRule,
            Self::DeleteAt(..) | Self::DeleteFirst(_) | Self::DeleteJump(_) => Kind::DeleteRule,
            Self::DeleteChain => Kind::DeleteChain,
        }
    }

    /// The rule that is added or deleted.
    #[must_use]
    pub fn rule(&self) -> Option<&SavedRule> {
        match self {
            Self::Append(rule)
            | Self::Insert(_, rule)
            | Self::Replace { rule, .. }
            | Self::DeleteAt(_, rule)
            | Self::DeleteFirst(rule)
            | Self::DeleteJump(rule) => Some(rule),
            Self::CreateChain | Self::DeleteChain => None,
        }
    }

    /// The rule that another took the place of.
    #[must_use]
    pub fn before(&self) -> Option<&SavedRule> {
        match self {
            Self::Replace { before, .. } => Some(before),
            _ => None,
        }
    }
}

/// Computes the owned rules of a family after the changes.
#[must_use]
pub fn applied(changes: &[Change], family: Family, ruleset: &Ruleset) -> Ruleset {
    let mut after = ruleset.clone();
    for change in changes.iter().filter(|change| change.family == family) {
        apply(change, after.tables.entry(change.table).or_default());
    }
    after.tables.retain(|_, owned| !owned.is_empty());
    after
}

fn apply(change: &Change, owned: &mut OwnedTable) {
    match &change.action {
        Action::CreateChain => {
            owned
                .chains
                .insert(change.chain.to_string(), Chain::default());
        }
        Action::DeleteChain => {
            owned.chains.remove(&*change.chain);
        }
        action => match owned.chains.get_mut(&*change.chain) {
            Some(chain) => edit(action, &mut chain.rules),
            None => edit_leads(action, &change.chain, &mut owned.jumps),
        },
    }
}

/// The rules of one of our chains after those steps in it.
#[must_use]
pub fn edited<'a>(chain: &Chain, steps: impl Iterator<Item = &'a Action>) -> Vec<SavedRule> {
    let mut rules = chain.rules.clone();
    for step in steps {
        edit(step, &mut rules);
    }
    rules
}

fn edit(action: &Action, rules: &mut Vec<SavedRule>) {
    let index = |at: &u32| *at as usize - 1;
    match action {
        Action::Append(rule) => rules.push(rule.clone()),
        Action::Insert(at, rule) => rules.insert(index(at), rule.clone()),
        Action::Replace { at, rule, .. } => rules[index(at)] = rule.clone(),
        Action::DeleteAt(at, _) => {
            rules.remove(index(at));
        }
        Action::CreateChain
        | Action::DeleteFirst(_)
        | Action::DeleteJump(_)
        | Action::DeleteChain => {}
    }
}

/// Edits the jump rules. Their positions count all rules of the chain, foreign
/// ones too. An appended rule comes after every known one.
fn edit_leads(action: &Action, chain: &str, jumps: &mut Vec<JumpRule>) {
    let lead = |position, rule: &SavedRule| JumpRule {
        chain: chain.to_owned(),
        position,
        rule: rule.clone(),
    };
    let shift = |jumps: &mut Vec<JumpRule>, from: u32, by: i32| {
        for lead in jumps.iter_mut().filter(|lead| lead.chain == chain) {
            if (from..u32::MAX).contains(&lead.position) {
                lead.position = lead.position.saturating_add_signed(by);
            }
        }
    };
    match action {
        Action::Append(rule) => jumps.push(lead(u32::MAX, rule)),
        Action::Insert(at, rule) => {
            shift(jumps, *at, 1);
            let earlier = |other: &JumpRule| other.chain == chain && other.position < *at;
            let index = jumps.iter().rposition(earlier).map_or(0, |index| index + 1);
            jumps.insert(index, lead(*at, rule));
        }
        Action::DeleteFirst(rule) | Action::DeleteJump(rule) => {
            let first = |lead: &JumpRule| lead.chain == chain && lead.rule == *rule;
            if let Some(index) = jumps.iter().position(first) {
                let gone = jumps.remove(index);
                shift(jumps, gone.position, -1);
            }
        }
        Action::CreateChain
        | Action::Replace { .. }
        | Action::DeleteAt(..)
        | Action::DeleteChain => {}
    }
}
