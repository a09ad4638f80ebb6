//! The longest common subsequence of two lists: the items that stay.

use std::collections::HashMap;
use std::hash::Hash;

/// The positions `(old, new)` of a longest common subsequence, ascending.
///
/// This is the algorithm of Hunt and Szymanski (1977). Every old item is paired
/// with its equals among the new ones, from the last to the first; `ends[n]` is
/// the pair with the earliest new position at which a common subsequence
/// of `n + 1` pairs can end. Time and space are proportional to the number of such
/// pairs. Rules nearly always differ from each other, so there are no more
/// pairs than rules.
///
/// Of an item with very many equals only the first are paired. The result is
/// then a common subsequence, but perhaps not a longest one. The common head
/// and tail of both lists stay in any case.
pub fn pairs<K: Eq + Hash>(old: &[K], new: &[K]) -> Vec<(usize, usize)> {
    let head = old
        .iter()
        .zip(new)
        .take_while(|(old, new)| old == new)
        .count();
    let (old, new) = (&old[head..], &new[head..]);
    let tail = old
        .iter()
        .rev()
        .zip(new.iter().rev())
        .take_while(|(old, new)| old == new)
        .count();
    let between = pairs_between(&old[..old.len() - tail], &new[..new.len() - tail]);
    let shifted = between
        .into_iter()
        .map(|(old, new)| (head + old, head + new));
    let last = (0..tail)
        .rev()
        .map(|back| (head + old.len() - 1 - back, head + new.len() - 1 - back));
    (0..head)
        .map(|at| (at, at))
        .chain(shifted)
        .chain(last)
        .collect()
}

fn pairs_between<K: Eq + Hash>(old: &[K], new: &[K]) -> Vec<(usize, usize)> {
    const MOST_EQUALS: usize = 64;
    let mut places: HashMap<&K, Vec<usize>> = HashMap::new();
    for (place, item) in new.iter().enumerate() {
        let equals = places.entry(item).or_default();
        if equals.len() < MOST_EQUALS {
            equals.push(place);
        }
    }
    let mut met: Vec<Meeting> = Vec::new();
    let mut ends: Vec<usize> = Vec::new();
    for (old, item) in old.iter().enumerate() {
        for &new in places.get(item).into_iter().flatten().rev() {
            let length = ends.partition_point(|end| met[*end].new < new);
            let before = length.checked_sub(1).map(|shorter| ends[shorter]);
            met.push(Meeting { old, new, before });
            match ends.get_mut(length) {
                Some(end) => *end = met.len() - 1,
                None => ends.push(met.len() - 1),
            }
        }
    }
    let mut pairs = Vec::with_capacity(ends.len());
    let mut next = ends.last().copied();
    while let Some(meeting) = next.map(|at| &met[at]) {
        pairs.push((meeting.old, meeting.new));
        next = meeting.before;
    }
    pairs.reverse();
    pairs
}

/// An old item and an equal new one, after the pair before them.
struct Meeting {
    old: usize,
    new: usize,
    before: Option<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The length by the textbook's table.
    fn longest(old: &[u8], new: &[u8]) -> usize {
        let mut row = vec![0; new.len() + 1];
        for left in old {
            let above = row.clone();
            for (at, right) in new.iter().enumerate() {
                row[at + 1] = if left == right {
                    above[at] + 1
                } else {
                    above[at + 1].max(row[at])
                };
            }
        }
        row[new.len()]
    }

    proptest! {
        #[test]
        fn it_is_common_and_the_longest(old in prop::collection::vec(0..9_u8, 0..30), new in prop::collection::vec(0..9_u8, 0..30)) {
            let pairs = pairs(&old, &new);
            prop_assert!(pairs.iter().all(|(left, right)| old[*left] == new[*right]));
            prop_assert!(pairs.windows(2).all(|two| two[0].0 < two[1].0 && two[0].1 < two[1].1));
            prop_assert_eq!(pairs.len(), longest(&old, &new));
        }
    }

    #[test]
    fn very_many_equals_do_not_take_very_long() {
        let same = vec![7_u8; 20_000];
        assert!(pairs(&same, &same).len() >= 64);
        let ascending: Vec<u32> = (0..20_000).collect();
        assert_eq!(pairs(&ascending, &ascending).len(), 20_000);
    }
}
