use super::*;
use crate::netfilter::Family;
use crate::netfilter::bpf::{HashKey, Hasher};
use crate::netfilter::flow::Flow;
use crate::netfilter::statistic::{Probability, Share};
use proptest::prelude::*;
use std::collections::HashSet;
use std::sync::Arc;

fn backends(weights: &[u32]) -> Vec<Backend> {
    // Any well-mixed numbers will do.
    let hash = |at: usize| (at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7;
    weights
        .iter()
        .enumerate()
        .map(|(at, weight)| Backend {
            hash: hash(at),
            weight: *weight,
        })
        .collect()
}

const CHOICE: Choice = Choice {
    hasher: Hasher {
        family: Family::Ipv4,
        key: HashKey::Source,
        prefix: 32,
    },
    seed: 0,
};

fn fits(arranged: Arranged) -> Arc<Arrangement> {
    match arranged {
        Arranged::Fits(arrangement) => arrangement,
        other => panic!("{other:?}"),
    }
}

fn in_turn(weights: &[u32]) -> [Arc<Arrangement>; 2] {
    let backends = backends(weights);
    [fits(flat_in_turn(&backends)), fits(tree_in_turn(&backends))]
}

fn rules(arrangement: &Arrangement) -> usize {
    arrangement
        .chains
        .iter()
        .map(|chain| chain.branches.len())
        .sum()
}

fn turns_in_a_round(weights: &[u32]) -> usize {
    let weights: Vec<u64> = weights.iter().map(|weight| u64::from(*weight)).collect();
    usize::try_from(weights.iter().sum::<u64>() / divisor(&weights)).unwrap()
}

/// Follows connections through the chains as the kernel does: each rule counts
/// the connections that reach it.
fn serve(arrangement: &Arrangement, connections: usize) -> Vec<usize> {
    let mut seen: Vec<Vec<u32>> = arrangement
        .chains
        .iter()
        .map(|chain| vec![0; chain.branches.len()])
        .collect();
    let mut served = Vec::new();
    for _ in 0..connections {
        let mut chain = 0;
        let backend = 'found: loop {
            for (branch, seen) in arrangement.chains[chain]
                .branches
                .iter()
                .zip(&mut seen[chain])
            {
                let takes = match branch.takes {
                    Statistic::Always => true,
                    Statistic::Nth { every, packet } => *seen % every == packet,
                    Statistic::Random(_) => unreachable!("not in turn"),
                };
                *seen = seen.wrapping_add(1);
                match branch.to {
                    _ if !takes => {}
                    To::Backend(backend) => break 'found backend,
                    To::Chain(next) => {
                        chain = next;
                        continue 'found;
                    }
                }
            }
            panic!("a connection passed all rules");
        };
        served.push(backend);
    }
    served
}

fn shares(arrangement: &Arrangement, backends: usize) -> Vec<f64> {
    let mut shares = vec![Share::NONE; backends];
    let mut reaching = vec![Flow::default(); arrangement.chains.len()];
    reaching[0] = Flow::all();
    for (at, chain) in arrangement.chains.iter().enumerate() {
        let mut left = std::mem::take(&mut reaching[at]);
        for branch in &chain.branches {
            let taken = left.take(branch.takes, &branch.hashes);
            match branch.to {
                To::Backend(backend) => shares[backend] = shares[backend].and(taken.share()),
                To::Chain(next) => reaching[next].join(taken),
            }
        }
        assert_eq!(left, Flow::default(), "connections pass all rules");
    }
    shares.into_iter().map(Share::as_f64).collect()
}

fn every(arrangement: &Arrangement) -> Vec<u32> {
    let every = |branch: &Branch| match branch.takes {
        Statistic::Nth { every, packet: 0 } => every,
        _ => 1,
    };
    arrangement.chains[0].branches.iter().map(every).collect()
}

#[test]
fn four_equal_servers_are_four_three_two_and_the_rest() {
    let flat = fits(flat_in_turn(&backends(&[1, 1, 1, 1])));
    assert_eq!(every(&flat), [4, 3, 2, 1]);
    assert_eq!(serve(&flat, 8), [0, 1, 2, 3, 0, 1, 2, 3]);
    let four = backends(&[1, 1, 1, 1]);
    assert_eq!(
        fits(flat_in_turn(&four).or_shorter(|| tree_in_turn(&four))),
        flat
    );
}

#[test]
fn the_example_by_chance_is_30_of_100_30_of_70_30_of_40_and_the_rest() {
    let flat = fits(flat_by_chance(&backends(&[30, 30, 30, 10])));
    let takes: Vec<_> = flat.chains[0]
        .branches
        .iter()
        .map(|branch| branch.takes)
        .collect();
    let of = |text| Statistic::Random(Probability::parse(text).unwrap());
    assert_eq!(
        takes,
        [
            of("0.3"),
            of("0.42857142857"),
            of("0.75"),
            Statistic::Always
        ]
    );
}

#[test]
fn weight_zero_has_no_rule() {
    let backends = backends(&[0, 5, 0]);
    for arranged in [
        flat_in_turn(&backends),
        tree_in_turn(&backends),
        flat_by_chance(&backends),
        tree_by_chance(&backends),
        flat_by_hash(&backends, CHOICE),
        tree_by_hash(&backends, CHOICE),
    ] {
        let only = Branch {
            takes: Statistic::Always,
            hashes: Vec::new(),
            to: To::Backend(1),
        };
        assert_eq!(
            fits(arranged).chains,
            [Node {
                id: String::new(),
                branches: vec![only]
            }]
        );
    }
}

#[test]
fn a_chance_that_the_kernel_cannot_express_is_found() {
    const MOST: u32 = u32::MAX >> 1;
    fits(flat_by_chance(&backends(&[MOST, 1])));
    fits(flat_by_chance(&backends(&[1, MOST])));
    let mut many = vec![MOST; 100];
    many.insert(0, 1);
    assert_eq!(flat_by_chance(&backends(&many)), Arranged::TooSmall(0));
    many.reverse();
    fits(flat_by_chance(&backends(&many)));
}

fn assert_fair(weights: &[u32], arrangement: &Arrangement) {
    let sum: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
    for (share, weight) in shares(arrangement, weights.len()).iter().zip(weights) {
        let error = (share - f64::from(*weight) / sum).abs();
        assert!(error < 1e-9, "{error:e} for {weight}");
    }
}

#[test]
fn ten_thousand_backends_get_their_shares() {
    let uneven: Vec<u32> = (0..10_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761) >> 12)
        .collect();
    let steep: Vec<u32> = (0..10_000_u32).map(|n| 1 << (n % 20)).collect();
    for weights in [vec![1; 10_000], uneven, steep] {
        let backends = backends(&weights);
        assert_fair(&weights, &fits(flat_by_chance(&backends)));
        assert_fair(&weights, &fits(tree_by_chance(&backends)));
    }
}

/// The largest deviation of a backend from its share, in connections.
fn deviation(weights: &[u32]) -> f64 {
    let sum: u32 = weights.iter().sum();
    let mut counts = vec![0_u32; weights.len()];
    let mut worst: f64 = 0.0;
    let flat = fits(flat_in_turn(&backends(weights)));
    for (at, backend) in serve(&flat, sum as usize).into_iter().enumerate() {
        counts[backend] += 1;
        for (count, weight) in counts.iter().zip(weights) {
            let fair = (at + 1) as f64 * f64::from(*weight) / f64::from(sum);
            worst = worst.max((f64::from(*count) - fair).abs());
        }
    }
    worst
}

#[test]
fn known_weights_take_few_rules_and_are_smooth() {
    let ladder: Vec<u32> = (1..=7).collect();
    for (weights, most) in [
        (&[3, 3, 3, 1][..], 4),
        (&[33, 33, 34], 4),
        (&[97, 3], 3),
        (&[7, 3], 3),
        (&[5, 1, 1], 3),
        (&ladder, 7),
        (&[101, 103, 107], 7),
        (&[997, 1009], 4),
        (&[30, 30, 30, 10], 4),
    ] {
        let found = fits(flat_in_turn(&backends(weights)));
        assert!(
            rules(&found) <= most,
            "{} rules for {weights:?}: {found:?}",
            rules(&found)
        );
        let deviation = deviation(weights);
        assert!(deviation <= 1.5, "{deviation} for {weights:?}");
    }
}

#[test]
fn equal_weights_are_served_in_listed_order_also_beside_others_and_in_a_tree() {
    let primes = [13, 31, 101, 997];
    let mut cases: Vec<Vec<u32>> = primes.iter().map(|prime| vec![5; *prime]).collect();
    cases.extend([
        vec![1; 7],
        vec![3, 3, 3, 1],
        vec![2, 7, 2, 7, 7],
        vec![33, 34, 33],
        vec![1; 1024],
        vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 8, 1],
    ]);
    for weights in cases {
        for arrangement in in_turn(&weights) {
            let mut first: Vec<usize> = Vec::new();
            let mut seen = HashSet::new();
            first.extend(
                serve(&arrangement, turns_in_a_round(&weights))
                    .into_iter()
                    .filter(|backend| seen.insert(*backend)),
            );
            for weight in &weights {
                let equal: Vec<_> = first.iter().filter(|at| weights[**at] == *weight).collect();
                assert!(equal.is_sorted(), "{first:?} of {weights:?}");
            }
            if weights.iter().all(|weight| *weight == weights[0]) {
                assert!(first.iter().copied().eq(0..weights.len()), "{first:?}");
            }
        }
    }
}

#[test]
fn the_same_weights_always_give_the_same_rules() {
    let weights = [20, 19, 18, 17, 16, 15, 14, 13, 11];
    assert_eq!(in_turn(&weights), in_turn(&weights));
}

#[test]
fn large_and_coprime_weights_take_some_dozens_of_rules_at_the_most() {
    const MOST: u32 = u32::MAX >> 1;
    for weights in [
        &[2_147_483_647, 1_000_000_007][..],
        &[1_000_003, 999_983, 7],
        &[2_147_483_647, 2_147_483_629, 2_147_483_587, 1],
        &[MOST, 1],
    ] {
        match flat_in_turn(&backends(weights)) {
            Arranged::Fits(flat) => assert!(rules(&flat) <= 64, "{} for {weights:?}", rules(&flat)),
            other => assert_eq!(other, Arranged::TooManyRules),
        }
    }
}

#[test]
fn a_tree_visits_the_logarithm_and_auto_takes_it() {
    let visits = |arrangement: &Arrangement| arrangement.visits() >> 64;
    for (count, most) in [(1024, 13), (10_000, 18)] {
        let backends = backends(&vec![1; count]);
        for (flat, tree) in [
            (flat_in_turn(&backends), tree_in_turn(&backends)),
            (flat_by_chance(&backends), tree_by_chance(&backends)),
        ] {
            let auto = fits(flat.clone().or_shorter(|| tree.clone()));
            assert_eq!(auto, fits(tree));
            assert!(visits(&auto) < most, "{} of {count}", visits(&auto));
            assert_eq!(visits(&fits(flat)), (count as u128) / 2);
        }
    }
}

#[test]
fn up_to_eight_equals_auto_takes_one_chain() {
    for count in 1..=12 {
        let backends = backends(&vec![5; count]);
        for (flat, tree) in [
            (flat_in_turn(&backends), tree_in_turn(&backends)),
            (flat_by_chance(&backends), tree_by_chance(&backends)),
        ] {
            let auto = fits(flat.or_shorter(|| tree));
            assert_eq!(auto.chains.len() == 1, count <= 8, "{count}");
        }
    }
}

#[test]
fn chains_of_a_tree_have_names_of_their_own_that_fit() {
    let backends = backends(&vec![3; 10_000]);
    for tree in [
        fits(tree_in_turn(&backends)),
        fits(tree_by_chance(&backends)),
        fits(tree_by_hash(&backends, CHOICE)),
    ] {
        let names: HashSet<&str> = tree.chains.iter().map(|chain| chain.id.as_str()).collect();
        assert_eq!(names.len(), tree.chains.len());
        assert!(names.iter().all(|name| {
            name.len() <= 7
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"_.".contains(&byte))
        }));
    }
}

/// Backends whose hashes are the same stand in one chain.
#[test]
fn equal_hashes_are_shared_out_one_after_the_other() {
    let same: Vec<Backend> = (0..20).map(|_| Backend { hash: 7, weight: 1 }).collect();
    assert_fair(&[1; 20], &fits(tree_by_chance(&same)));
    assert_fair(&[1; 20], &fits(tree_by_hash(&same, CHOICE)));
}

/// The rules of an arrangement by chain, with backends by their hash.
fn texts(arrangement: &Arrangement, backends: &[Backend]) -> HashSet<String> {
    let takes = |branch: &Branch| (branch.takes, branch.hashes.clone());
    let rule = |chain: &Node, branch: &Branch| match branch.to {
        To::Backend(at) => format!("{} {:?} {}", chain.id, takes(branch), backends[at].hash),
        To::Chain(next) => format!(
            "{} {:?} {}",
            chain.id,
            takes(branch),
            arrangement.chains[next].id
        ),
    };
    let chains = arrangement.chains.iter();
    chains
        .flat_map(|chain| chain.branches.iter().map(move |branch| rule(chain, branch)))
        .collect()
}

#[test]
fn in_a_tree_one_backend_changes_few_rules_wherever_it_stands_in_the_list() {
    for tree in [tree_by_chance, |backends: &[Backend]| {
        tree_by_hash(backends, CHOICE)
    }] {
        one_backend_changes_few_rules(tree);
    }
}

fn one_backend_changes_few_rules(tree: fn(&[Backend]) -> Arranged) {
    let all = backends(&vec![10; 1001]);
    for at in [0, 1, 17, 500, 999, 1000] {
        let mut without = all.clone();
        let gone = without.remove(at);
        let mut moved = without.clone();
        moved.insert(1000 - at, gone);
        let mut heavier = all.clone();
        heavier[at].weight = 23;
        let rules = |backends: &[Backend]| texts(&fits(tree(backends)), backends);
        assert_eq!(rules(&moved), rules(&all), "the order of the list");
        for (one, other) in [(&all, &without), (&without, &all), (&all, &heavier)] {
            let written = rules(other).difference(&rules(one)).count();
            assert!(written <= 64, "{written} rules written for {at}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_round_in_a_row_is_exact(weights in prop::collection::vec(0..12_u32, 1..40), start in 0..100_usize) {
        prop_assume!(weights.iter().any(|weight| *weight > 0));
        let round = turns_in_a_round(&weights);
        let in_common = weights.iter().map(|weight| u64::from(*weight)).collect::<Vec<_>>();
        for arrangement in in_turn(&weights) {
            let served = serve(&arrangement, start + round);
            let mut turns = vec![0_u64; weights.len()];
            served[start..].iter().for_each(|backend| turns[*backend] += 1);
            for (turns, weight) in turns.iter().zip(&weights) {
                prop_assert_eq!(turns * divisor(&in_common), u64::from(*weight));
            }
        }
    }

    #[test]
    fn ordinary_weights_are_smooth_and_never_take_more_than_a_rule_for_each_turn(weights in prop::collection::vec(1..=20_u32, 2..=9)) {
        let deviation = deviation(&weights);
        prop_assert!(deviation <= 1.5, "{} for {:?}", deviation, weights);
        prop_assert!(rules(&in_turn(&weights)[0]) <= turns_in_a_round(&weights));
    }

    #[test]
    fn any_share_is_within_a_billionth(weights in prop::collection::vec(prop_oneof![0..=crate::request::WEIGHT_MAX, 0..100_u32], 1..60)) {
        prop_assume!(weights.iter().any(|weight| *weight > 0));
        let backends = backends(&weights);
        for arranged in [
            flat_by_chance(&backends),
            tree_by_chance(&backends),
            flat_by_hash(&backends, CHOICE),
            tree_by_hash(&backends, CHOICE),
        ] {
            if let Arranged::Fits(arrangement) = arranged {
                assert_fair(&weights, &arrangement);
            }
        }
    }
}
