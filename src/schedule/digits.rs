//! Digits of the backends' own hashes, which decide about positions in a tree.

use super::arrangement::{Backend, with_weight};

/// The number of hash bits that decide about positions, and the number used at
/// each branching.
///
/// With two bits a chain sends a quarter of its connections on, a third of the
/// rest, half of the rest, and goes on with the last quarter. A connection
/// visits a few more rules than with one bit, and a quarter fewer chains, which
/// cost more (`benches/flows.py`).
pub const HASH_BITS: u32 = 36;
const DIGIT_BITS: u32 = 2;
const DIGITS: u32 = HASH_BITS / DIGIT_BITS;

/// The backends that have a weight, sorted by their hash bits that are used.
pub fn by_hash(backends: &[Backend]) -> Vec<usize> {
    let mut places = with_weight(backends);
    places.sort_by_key(|at| {
        (
            backends[*at].hash & ((1 << HASH_BITS) - 1),
            backends[*at].hash,
        )
    });
    places
}

/// The first digit from `digit` on in which not all agree.
pub fn first_difference(places: &[usize], backends: &[Backend], digit: u32) -> Option<u32> {
    let (first, last) = (places.first()?, places.last()?);
    // They are sorted, so the first and the last differ first.
    (digit..DIGITS).find(|digit| {
        digit_of(backends[*first].hash, *digit) != digit_of(backends[*last].hash, *digit)
    })
}

/// The beginning of the last group with the same digit; `None` if all are in
/// one group.
pub fn last_group(places: &[usize], backends: &[Backend], digit: u32) -> Option<usize> {
    let digit_at = |at: &usize| digit_of(backends[*at].hash, digit);
    let last = digit_at(places.last()?);
    Some(places.partition_point(|at| digit_at(at) < last)).filter(|at| *at > 0)
}

/// A digit of a hash, from the highest of those that are used.
fn digit_of(hash: u64, digit: u32) -> u64 {
    hash >> (HASH_BITS - DIGIT_BITS * (digit + 1)) & ((1 << DIGIT_BITS) - 1)
}

/// A number for all hashes that begin like this one, up to and including the
/// digit: 36 bits of the hash, and 6 bits for the number of digits.
pub fn group_number(hash: u64, digit: u32) -> u64 {
    let unused = HASH_BITS - DIGIT_BITS * (digit + 1);
    let prefix = (hash & ((1 << HASH_BITS) - 1)) >> unused << unused;
    prefix << 6 | u64::from(digit)
}

/// The name of the chain for a group: its number, in 7 letters.
pub fn id(hash: u64, digit: u32) -> String {
    const LETTERS: &[u8; 64] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_.";
    let number = group_number(hash, digit);
    let letter = |place: u32| char::from(LETTERS[(number >> (6 * place) & 63) as usize]);
    (0..7).rev().map(letter).collect()
}
