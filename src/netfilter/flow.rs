//! Connections on their way through rules, by the hashes that they may have.
//!
//! A chance is independent of every other. A hash is not: a connection that one rule
//! with a hash let pass gives the same answer to the next rule with that hash. So a
//! flow carries along the ranges that are known of its hashes, and its shares are
//! exact, also where several rules ask for the same hash.

use std::ops::Range;

use super::bpf::{HashMatch, Hasher};
use super::statistic::{Share, Statistic};

/// Connections that reach a rule or a chain. By default none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flow(Vec<Part>);

/// Connections of which the same is known.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    share: Share,
    known: Vec<Known>,
}

/// The range that a hash is in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    hasher: Hasher,
    seed: u32,
    range: Range<u64>,
}

/// The most parts, and the most known ranges of one. Rules of ours need some dozens.
/// Beyond it hashes count as independent.
const MOST: usize = 256;

impl Flow {
    /// All connections.
    #[must_use]
    pub fn all() -> Self {
        let known = Vec::new();
        Self(vec![Part {
            share: Share::ALL,
            known,
        }])
    }

    /// The share of all connections.
    #[must_use]
    pub fn share(&self) -> Share {
        let sum = |sum: Share, part: &Part| sum.and(part.share);
        self.0.iter().fold(Share::NONE, sum)
    }

    /// Adds connections that get to the same place. Those of which the same is known
    /// become one part: the order in which they come then makes no difference.
    pub fn join(&mut self, other: Self) {
        for part in other.0 {
            match self.0.iter_mut().find(|own| own.known == part.known) {
                Some(own) => own.share = own.share.and(part.share),
                None => self.0.push(part),
            }
        }
        if self.0.len() > MOST {
            let (share, known) = (self.share(), Vec::new());
            self.0 = vec![Part { share, known }];
        }
    }

    /// The part `share` of these connections, independent of all that is known of them.
    #[must_use]
    pub fn scaled(mut self, share: Share) -> Self {
        for part in &mut self.0 {
            part.share = part.share.times(share);
        }
        self.0.retain(|part| part.share != Share::NONE);
        self
    }

    /// Takes the connections out that a rule matches.
    #[must_use]
    pub fn take(&mut self, statistic: Statistic, hashes: &[HashMatch]) -> Self {
        let mut taken = Self::default();
        for mut part in std::mem::take(&mut self.0) {
            let mut passing = Vec::new();
            for hash in hashes {
                passing.push(part.leave_out(hash));
            }
            let (share, rest) = part.share.split(statistic);
            passing.push(Part {
                share: rest,
                known: match rest {
                    Share::NONE => Vec::new(),
                    _ => part.known.clone(),
                },
            });
            passing.retain(|part| part.share != Share::NONE);
            self.join(Self(passing));
            if share != Share::NONE {
                taken.0.push(Part { share, ..part });
            }
        }
        taken
    }
}

impl Part {
    /// Leaves out the connections that a hash does not match, and returns them.
    fn leave_out(&mut self, hash: &HashMatch) -> Self {
        let is_same = |known: &Known| known.hasher == hash.hasher && known.seed == hash.seed;
        let at = self.known.iter().position(is_same).unwrap_or_else(|| {
            if self.known.len() == MOST {
                self.known.remove(0);
            }
            self.known.push(Known {
                hasher: hash.hasher,
                seed: hash.seed,
                range: 0..1 << 32,
            });
            self.known.len() - 1
        });
        let Range { start, end } = self.known[at].range.clone();
        let below = u64::from(hash.below).clamp(start, end);
        let (taken, passing) = match end > start {
            true => self.share.split_evenly(below - start, end - start),
            false => (Share::NONE, Share::NONE),
        };
        let mut left = Self {
            share: passing,
            known: match passing {
                Share::NONE => Vec::new(),
                _ => self.known.clone(),
            },
        };
        if let Some(known) = left.known.get_mut(at) {
            known.range.start = below;
        }
        self.share = taken;
        self.known[at].range.end = below;
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netfilter::Family;
    use crate::netfilter::bpf::HashKey;

    fn hash(seed: u32, below: u32) -> HashMatch {
        HashMatch {
            hasher: Hasher {
                family: Family::Ipv4,
                key: HashKey::Source,
                prefix: 32,
            },
            seed,
            below,
        }
    }

    const HALF: u32 = 1 << 31;

    fn taken(rules: &[&[HashMatch]]) -> Vec<f64> {
        let mut flow = Flow::all();
        let mut take = |hashes: &&[HashMatch]| flow.take(Statistic::Always, hashes).share();
        rules.iter().map(|rule| take(rule).as_f64()).collect()
    }

    #[test]
    fn different_hashes_are_independent() {
        let shares = taken(&[&[hash(1, HALF)], &[hash(2, HALF)], &[]]);
        assert_eq!(shares, [0.5, 0.25, 0.25]);
    }

    #[test]
    fn the_same_hash_gives_the_same_answer() {
        assert_eq!(taken(&[&[hash(1, HALF)], &[hash(1, HALF)]]), [0.5, 0.0]);
        assert_eq!(
            taken(&[&[hash(1, HALF / 2)], &[hash(1, HALF)], &[]]),
            [0.25, 0.25, 0.5]
        );
        let both = [hash(1, HALF), hash(2, HALF / 2)];
        assert_eq!(taken(&[&both, &both[..1], &[]]), [0.125, 0.375, 0.5]);
        assert_eq!(taken(&[&both, &both[1..], &[]]), [0.125, 0.125, 0.75]);
    }

    #[test]
    fn a_chance_beside_a_hash_leaves_the_rest_of_it() {
        let mut flow = Flow::all();
        let nth = Statistic::Nth {
            every: 2,
            packet: 0,
        };
        let half = flow.take(nth, &[hash(1, HALF)]);
        let rest = flow.take(Statistic::Always, &[hash(1, HALF)]);
        let flows = [half, rest, flow];
        let shares: Vec<f64> = flows.iter().map(|flow| flow.share().as_f64()).collect();
        assert_eq!(shares, [0.25, 0.25, 0.5]);
    }

    #[test]
    fn nothing_is_lost_where_too_much_is_to_be_known() {
        let mut flow = Flow::all();
        let mut sum = Share::NONE;
        for seed in 0..2000 {
            let pair = [hash(2 * seed, HALF), hash(2 * seed + 1, 1 << 20)];
            sum = sum.and(flow.take(Statistic::Always, &pair).share());
            assert!(flow.0.len() <= MOST);
            assert_eq!(sum.and(flow.share()), Share::ALL);
        }
    }
}
