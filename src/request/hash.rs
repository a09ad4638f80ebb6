//! `hash_key`, `hash_prefix` and `hash_seed`: the choice by a hash.

use serde_json::Value;

use super::coerce::{BadRequest, Field, Mistakes, Path, integer};
use super::unchecked::{HashKey, RequestAttributes};
use super::{Mode, given, json, word};
use crate::netfilter::Family;
use crate::netfilter::bpf;
use crate::netfilter::bpf::Hasher;
use crate::schedule::Choice;

/// The hash that a balancer decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashing {
    /// The part of a connection that decides.
    pub key: HashKey,
    /// The leading bits of an IPv4 address that count.
    ipv4: u8,
    /// The leading bits of an IPv6 address that count.
    ipv6: u8,
    /// Another number gives another choice.
    pub seed: u32,
}

impl Default for Hashing {
    fn default() -> Self {
        Self {
            key: HashKey::Source,
            ipv4: 32,
            ipv6: 64,
            seed: 0,
        }
    }
}

impl Hashing {
    /// The leading bits of an address that count.
    #[must_use]
    pub fn prefix(self, family: Family) -> u8 {
        match family {
            Family::Ipv4 => self.ipv4,
            Family::Ipv6 => self.ipv6,
        }
    }

    /// The decisions for clients of a family.
    pub(super) fn choice(self, family: Family) -> Choice {
        let key = match self.key {
            HashKey::Source => bpf::HashKey::Source,
            HashKey::Connection => bpf::HashKey::Connection,
        };
        let prefix = self.prefix(family);
        Choice {
            hasher: Hasher {
                family,
                key,
                prefix,
            },
            seed: self.seed,
        }
    }
}

/// Reads the attributes, which are for `mode: hash` only.
pub(super) fn hashing(attributes: &RequestAttributes, mode: Mode) -> Result<Hashing, BadRequest> {
    let mut mistakes = Mistakes::default();
    let all = [
        ("hash_key", &attributes.hash_key),
        ("hash_prefix", &attributes.hash_prefix),
        ("hash_seed", &attributes.hash_seed),
    ];
    for (attribute, value) in all {
        if mode != Mode::Hash && given(attribute, value).is_some() {
            let problem = format!(
                "is for `mode: hash`, and the mode is `{}`; say `mode: hash`, or leave it out",
                mode.as_str()
            );
            mistakes.add(BadRequest::new(attribute, problem));
        }
    }
    let read = mistakes.take(values(attributes));
    mistakes.or(read)
}

/// Reads the values of the attributes.
pub(super) fn values(attributes: &RequestAttributes) -> Result<Hashing, BadRequest> {
    let mut mistakes = Mistakes::default();
    let key = mistakes.take(word("hash_key", &attributes.hash_key, HashKey::WORDS));
    let seed = given("hash_seed", &attributes.hash_seed);
    let seed = mistakes.take(seed.map_or(Ok(0), |place| integer(&place, 0..=u32::MAX)));
    let prefixes = given("hash_prefix", &attributes.hash_prefix);
    let prefixes = prefixes.map_or(Ok(Hashing::default()), |place| prefixes_of(&place));
    let prefixes = mistakes.take(prefixes);
    let read = prefixes.zip(key).zip(seed);
    mistakes.or(read.map(|((prefixes, key), seed)| Hashing {
        key,
        seed,
        ..prefixes
    }))
}

/// An object, or its JSON text.
fn prefixes_of(place: &Field) -> Result<Hashing, BadRequest> {
    let parsed = match &*place.value {
        Value::String(text) if text.trim_start().starts_with('{') => {
            let parsed = json::parse(text.trim().as_bytes());
            parsed.map_err(|error| place.refuse(format!("is not JSON: {error}")))?
        }
        value => value.clone(),
    };
    let Value::Object(lengths) = parsed else {
        return Err(place.refuse("is not {ipv4: 1 to 32, ipv6: 1 to 128}"));
    };
    let mut mistakes = Mistakes::default();
    let mut found = Hashing::default();
    for (name, value) in lengths.iter().filter(|(_, value)| !value.is_null()) {
        let place = Field::new(Path::from("hash_prefix").key(name), value);
        let (length, bits) = match name.as_str() {
            "ipv4" => (&mut found.ipv4, 32),
            "ipv6" => (&mut found.ipv6, 128),
            _ => {
                mistakes.add(place.bad("is neither `ipv4` nor `ipv6`"));
                continue;
            }
        };
        let read = mistakes.take(integer(&place, 1..=bits));
        *length = read
            .and_then(|read| read.try_into().ok())
            .unwrap_or(*length);
    }
    mistakes.or(Some(found))
}
