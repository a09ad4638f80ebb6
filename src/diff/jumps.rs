//! Jump rules: the rules of foreign chains that lead to ours.

use std::collections::BTreeSet;

use super::change::Action;
use super::{TableDiff, written};
use crate::netfilter::rule::is_undeletable;
use crate::netfilter::ruleset::{JumpRule, SavedRule};
use crate::plan::{JumpPosition, PlannedJump};

/// The jump rules of one table, compared with the planned ones.
struct Comparison<'a> {
    /// Observed rules with a planned meaning.
    kept: Vec<&'a JumpRule>,
    /// All other observed rules.
    stale: Vec<&'a JumpRule>,
    /// Planned rules that do not exist.
    missing: Vec<&'a PlannedJump>,
}

impl<'a> Comparison<'a> {
    fn new(found: &'a [JumpRule], planned: &'a [PlannedJump], refused_at: Option<u32>) -> Self {
        let mut comparison = Self {
            kept: Vec::new(),
            stale: found.iter().collect(),
            missing: Vec::new(),
        };
        for jump in planned {
            let fits = |found: &&JumpRule| {
                found.rule.meaning.as_ref() == Some(&jump.rule) && may_take(jump, found, refused_at)
            };
            match comparison.stale.iter().position(fits) {
                Some(at) => comparison.kept.push(comparison.stale.remove(at)),
                None => comparison.missing.push(jump),
            }
        }
        comparison
    }

    /// Takes the kept rules out that a deletion by text would hit: a stale rule of
    /// the same chain has the same text.
    fn take_endangered(&mut self) -> Vec<&'a JumpRule> {
        let stale = &self.stale;
        let is_endangered = |jump: &&JumpRule| {
            let mut stale = stale.iter();
            stale.any(|other| other.chain == jump.chain && other.rule == jump.rule)
        };
        let (endangered, kept) = self.kept.iter().copied().partition(is_endangered);
        self.kept = kept;
        endangered
    }

    /// Takes the stale rules out that iptables cannot delete by their text.
    fn take_undeletable(&mut self) -> Vec<&'a JumpRule> {
        let stale = self.stale.iter().copied();
        let (undeletable, stale) =
            stale.partition(|jump: &&JumpRule| is_undeletable(&jump.rule.shown()));
        self.stale = stale;
        undeletable
    }
}

/// Returns true if a planned rule may stand at the position of an observed one. In
/// filter's FORWARD a position after the first rule that refuses is wrong.
fn may_take(jump: &PlannedJump, found: &JumpRule, refused_at: Option<u32>) -> bool {
    let is_in_time = refused_at.is_none_or(|refused| found.position < refused);
    jump.chain == found.chain && (jump.place != JumpPosition::BeforeRefusals || is_in_time)
}

impl TableDiff {
    /// The first jump rule with the planned meaning stays where it is. All others
    /// are deleted, and a new one takes the position of a deleted one.
    ///
    /// A rule is deleted by its text, which hits the first rule with that text. If
    /// that one is to stay, all rules with this text are deleted, and it is
    /// inserted again at its position.
    pub(super) fn jumps_to_plan(
        &mut self,
        found: &[JumpRule],
        planned: &[PlannedJump],
        refused_at: Option<u32>,
    ) {
        let mut comparison = Comparison::new(found, planned, refused_at);
        let mut deleted = comparison.take_endangered();
        let mut inserted: Vec<(&JumpRule, SavedRule)> = deleted
            .iter()
            .map(|jump| (*jump, jump.rule.clone()))
            .collect();
        let undeletable = comparison.take_undeletable();
        deleted.extend(&comparison.stale);
        for jump in &deleted {
            self.push(jump.chain.as_str(), Action::DeleteFirst(jump.rule.clone()));
        }
        let mut free = comparison.stale;
        let mut missing = comparison.missing;
        missing.retain(|jump| {
            let position = free
                .iter()
                .position(|found| may_take(jump, found, refused_at));
            let Some(position) = position else {
                return true;
            };
            inserted.push((free.remove(position), written(&jump.rule)));
            false
        });
        self.insert_at_positions(inserted, &deleted);
        self.add_jumps(&missing);
        for jump in undeletable {
            self.push(jump.chain.as_str(), Action::DeleteJump(jump.rule.clone()));
        }
    }

    /// Adds rules at an end of their chain.
    fn add_jumps(&mut self, missing: &[&PlannedJump]) {
        let (last, first): (Vec<&PlannedJump>, Vec<_>) = missing
            .iter()
            .partition(|jump| jump.place == JumpPosition::End);
        for jump in last {
            self.push(jump.chain, Action::Append(written(&jump.rule)));
        }
        for jump in first.into_iter().rev() {
            self.push(jump.chain, Action::Insert(1, written(&jump.rule)));
        }
    }

    /// Inserts rules at the positions of deleted ones of ours. This is the only
    /// use of a number in a foreign chain: an insertion cannot hit a foreign
    /// rule, and iptables has no other way to give a position.
    fn insert_at_positions(
        &mut self,
        mut inserted: Vec<(&JumpRule, SavedRule)>,
        deleted: &[&JumpRule],
    ) {
        inserted.sort_by(|(one, _), (other, _)| {
            (&one.chain, one.position).cmp(&(&other.chain, other.position))
        });
        for (at, (place, rule)) in inserted.iter().enumerate() {
            let before =
                |other: &&&JumpRule| other.chain == place.chain && other.position < place.position;
            let deleted = deleted.iter().filter(before).count();
            let back = inserted[..at]
                .iter()
                .filter(|(other, _)| other.chain == place.chain)
                .count();
            let gap = u32::try_from(deleted - back).unwrap_or(0);
            self.push(
                place.chain.as_str(),
                Action::Insert(place.position - gap, rule.clone()),
            );
        }
    }

    /// Unless all jump rules of a chain are as they were, they are deleted, and
    /// the earlier ones are inserted at their places. One that iptables cannot
    /// delete stays where it is if it was there before.
    pub(super) fn jumps_to_earlier(&mut self, found: &[JumpRule], earlier: &[JumpRule]) {
        let chains: BTreeSet<&str> = found
            .iter()
            .chain(earlier)
            .map(|jump| jump.chain.as_str())
            .collect();
        for chain in chains {
            let of_chain = |jumps: &[JumpRule]| {
                let jumps = jumps.iter().filter(|jump| jump.chain == chain);
                jumps.cloned().collect::<Vec<_>>()
            };
            let (mut found, mut earlier) = (of_chain(found), of_chain(earlier));
            if found == earlier {
                continue;
            }
            found.retain(|jump| {
                let before = earlier.iter().position(|other| other.rule == jump.rule);
                match before.filter(|_| is_undeletable(&jump.rule.shown())) {
                    Some(at) => drop(earlier.remove(at)),
                    None => return true,
                }
                false
            });
            let (undeletable, found): (Vec<_>, Vec<_>) = found
                .into_iter()
                .partition(|jump| is_undeletable(&jump.rule.shown()));
            for jump in found {
                self.push(chain, Action::DeleteFirst(jump.rule));
            }
            for jump in earlier {
                self.push(chain, Action::Insert(jump.position, jump.rule));
            }
            for jump in undeletable {
                self.push(chain, Action::DeleteJump(jump.rule));
            }
        }
    }
}
