//! The dialect of iptables-nft 1.8.0 to 1.8.2. Seen with these releases, and
//! explained by their sources:
//!
//! - After an insertion or replacement it counts the rules of that chain
//!   wrongly, for the rest of the transaction: of several `-R` only the first
//!   hits the right rule (netfilter bug 1348), an `-I` beside another may go to
//!   the top of the chain. So our chains are filled again as a whole, and in a
//!   foreign chain each position is that of a rule that existed before.
//! - To find the rule of a `-D` it reads those above it, and then does not know
//!   the options of their extensions any more. So each `-D` has a transaction
//!   of its own, and for a moment two rules may balance the same traffic.
//! - At `-F` it forgets unsent rules of the same table, and crashes. That is
//!   why [`super::block`] begins with `-F`, for every version.

use std::iter;

use crate::diff::change::{Action, Change, edited};
use crate::netfilter::ruleset::{Chain, Ruleset, SavedRule};
use crate::netfilter::{Family, Table};

/// The changes of one family as a sequence of transactions.
///
/// Rules of foreign chains are deleted last, so that no traffic is without a
/// rule meanwhile. A rule is deleted first if it jumps to a deleted chain, or
/// if a new rule has the same text and would be hit instead.
pub fn transactions(changes: Vec<&Change>, family: Family, found: &Ruleset) -> Vec<Vec<Change>> {
    let is_delete = |change: &&Change| matches!(change.action, Action::DeleteFirst(_));
    let (deletes, others): (Vec<_>, Vec<_>) = changes.into_iter().partition(is_delete);
    let is_first = |delete: &&Change| {
        let rule = delete.action.rule();
        others.iter().any(|other| {
            let is_its_target = other.action == Action::DeleteChain
                && rule.is_some_and(|rule| leads_to(rule, &other.chain));
            let reads_like_it = other.chain == delete.chain && other.action.rule() == rule;
            other.table == delete.table && (is_its_target || reads_like_it)
        })
    };
    let (first, last): (Vec<_>, Vec<_>) = deletes.into_iter().partition(is_first);
    let mut main = Vec::new();
    for edits in others.chunk_by(|one, next| (one.table, &one.chain) == (next.table, &next.chain)) {
        let (table, chain) = (edits[0].table, &edits[0].chain);
        let actions = edits.iter().map(|change| &change.action);
        let actions = match found.owned(table).chains.get(&**chain) {
            Some(found) if actions.clone().any(counts) => refill(found, actions),
            Some(_) => actions.cloned().collect(),
            None => from_below(actions, slots(found, table, chain, [&first, &last])),
        };
        main.extend(actions.into_iter().map(|action| Change {
            family,
            table,
            chain: chain.clone(),
            action,
        }));
    }
    let alone = |change: &Change| vec![change.clone()];
    let first = first.into_iter().map(alone);
    let last = last.into_iter().map(alone);
    let all = first.chain([main]).chain(last);
    all.filter(|changes| !changes.is_empty()).collect()
}

fn leads_to(rule: &SavedRule, chain: &str) -> bool {
    let target = rule.text.strip_suffix(chain.as_bytes());
    target.is_some_and(|rest| rest.ends_with(b" -j ") || rest.ends_with(b" -g "))
}

/// Returns true if the step uses a rule number.
fn counts(action: &Action) -> bool {
    matches!(
        action,
        Action::Insert(..) | Action::Replace { .. } | Action::DeleteAt(..)
    )
}

/// Steps that replace or delete every rule.
fn refill<'a>(found: &Chain, steps: impl Iterator<Item = &'a Action>) -> Vec<Action> {
    let mut before = found.rules.iter().map(|rule| Box::new(rule.clone()));
    let mut actions = Vec::new();
    let mut at = 0;
    for rule in edited(found, steps) {
        at += 1;
        actions.push(match before.next() {
            Some(before) => Action::Replace { at, before, rule },
            None => Action::Append(rule),
        });
    }
    actions.extend(before.map(|rule| Action::DeleteAt(at + 1, *rule)));
    actions
}

/// A rule of a foreign chain, while the steps are simulated.
#[derive(Clone, Copy, PartialEq)]
enum Slot<'a> {
    Stays,
    Goes,
    Comes(&'a SavedRule),
}

/// The rules of a chain as far as we know of any, after those that go first.
fn slots<'a>(
    found: &Ruleset,
    table: Table,
    chain: &str,
    [first, last]: [&[&Change]; 2],
) -> Vec<Slot<'a>> {
    let jumps = found.owned(table).jumps.iter();
    let mut jumps: Vec<_> = jumps.filter(|lead| lead.chain == chain).collect();
    let known = jumps.iter().map(|lead| lead.position as usize).max();
    let mut slots = vec![Some(Slot::Stays); known.unwrap_or(0)];
    let goes = [(first, None), (last, Some(Slot::Goes))];
    for (deletes, becomes) in goes {
        for delete in deletes
            .iter()
            .filter(|delete| (delete.table, &*delete.chain) == (table, chain))
        {
            let gone = jumps
                .iter()
                .position(|lead| Some(&lead.rule) == delete.action.rule());
            if let Some(gone) = gone {
                slots[jumps.remove(gone).position as usize - 1] = becomes;
            }
        }
    }
    slots.into_iter().flatten().collect()
}

/// The same steps in a foreign chain, with positions of rules that existed
/// before.
fn from_below<'a>(
    steps: impl Iterator<Item = &'a Action>,
    mut slots: Vec<Slot<'a>>,
) -> Vec<Action> {
    let mut others = Vec::new();
    for step in steps {
        match step {
            Action::Insert(at, rule) => take_slot(&mut slots, *at as usize - 1, rule),
            other => others.push(other.clone()),
        }
    }
    others.extend(upwards(&slots));
    others
}

/// Puts a rule above the one that is at that index, without those that go.
fn take_slot<'a>(slots: &mut Vec<Slot<'a>>, index: usize, rule: &'a SavedRule) {
    let stays = |place: &&Slot| **place != Slot::Goes;
    let missing = (index + 1).saturating_sub(slots.iter().filter(stays).count());
    slots.extend(iter::repeat_n(Slot::Stays, missing));
    let mut left = slots.iter().enumerate().filter(|(_, place)| stays(place));
    if let Some((at, _)) = left.nth(index) {
        slots.insert(at, Slot::Comes(rule));
    }
}

/// Inserts each new rule by the number of the old rule that follows it. At the top of
/// the chain each goes above the last, elsewhere each just above that next one.
fn upwards(slots: &[Slot]) -> Vec<Action> {
    let was_there = |place: &Slot| !matches!(place, Slot::Comes(_));
    let groups: Vec<_> = slots.split(was_there).collect();
    let mut steps = Vec::new();
    for (above, group) in groups.into_iter().enumerate().rev() {
        let place = u32::try_from(above + 1).unwrap_or(u32::MAX);
        let coming = group.iter().filter_map(|coming| match coming {
            Slot::Comes(rule) => Some(Action::Insert(place, (*rule).clone())),
            _ => None,
        });
        match above {
            0 => steps.extend(coming.rev()),
            _ => steps.extend(coming),
        }
    }
    steps
}
