//! One server of the list, in each of its forms.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use serde_json::Value;

use super::coerce::{BadRequest, Field, integer, integer_in, list, text};
use super::wire::BackendAttributes;
use super::{WEIGHT_MAX, given, json, shaped};
use crate::netfilter::Endpoint;

/// One server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its address and port; without a port connections keep theirs.
    pub endpoint: Endpoint,
    /// Its part, 0 to 2^31 - 1.
    pub weight: u32,
}

/// One item of the list, whose host may have several addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BackendEntry {
    pub host: Host,
    pub port: Option<u16>,
    pub weight: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Host {
    Address(IpAddr),
    Name(String),
}

impl Host {
    pub fn is_name(&self) -> bool {
        matches!(self, Self::Name(_))
    }
}

impl Backend {
    /// A number that depends on nothing but the address and port: FNV-1a over
    /// their bytes, and then mixed as `SplitMix64` does, so that all its bits do.
    #[must_use]
    pub fn hash(&self) -> u64 {
        let (ipv4, ipv6);
        let address: &[u8] = match self.endpoint.address {
            IpAddr::V4(address) => {
                ipv4 = address.octets();
                &ipv4
            }
            IpAddr::V6(address) => {
                ipv6 = address.octets();
                &ipv6
            }
        };
        let port = self.endpoint.port.unwrap_or(0).to_be_bytes();
        let fnv =
            |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        let mixed =
            |hash: u64, shift: u32, factor: u64| (hash ^ hash >> shift).wrapping_mul(factor);
        let bytes = address.iter().chain(&port);
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325, fnv);
        let hash = mixed(
            mixed(hash, 30, 0xbf58_476d_1ce4_e5b9),
            27,
            0x94d0_49bb_1331_11eb,
        );
        hash ^ hash >> 31
    }
}

/// The list, without repetition.
pub(super) fn backends(place: &Field) -> Result<Vec<BackendEntry>, BadRequest> {
    let items = list(place)?;
    let mut found: Vec<BackendEntry> = Vec::with_capacity(items.len());
    for item in items {
        found.push(backend(&item)?);
    }
    match repetition(&found) {
        None => Ok(found),
        Some((earlier, again)) => {
            let paths: Vec<_> = list(place)?.map(|item| item.path.to_string()).collect();
            let problem = format!(
                "is the same address and port as {}; list it once, with the sum of the weights",
                paths[earlier]
            );
            Err(BadRequest::new(paths[again].clone(), problem))
        }
    }
}

/// The places of the first item that was there before, and of that.
fn repetition(listed: &[BackendEntry]) -> Option<(usize, usize)> {
    let mut known = HashMap::with_capacity(listed.len());
    let mut items = listed.iter().enumerate();
    items.find_map(|(again, item)| {
        let earlier = known.insert((&item.host, item.port), again)?;
        Some((earlier, again))
    })
}

fn backend(place: &Field) -> Result<BackendEntry, BadRequest> {
    match &*place.value {
        Value::Object(object) => backend_from_object(place, object),
        Value::String(_) => backend_from_text(place),
        _ => Err(place.refuse(
            "is neither an object {address, port, weight} nor a string HOST[:PORT] [weight=N]",
        )),
    }
}

fn backend_from_object(place: &Field, object: &json::Object) -> Result<BackendEntry, BadRequest> {
    let wire: BackendAttributes = shaped(&place.path, object)?;
    let address = given(place.path.key("address"), &wire.address)
        .ok_or_else(|| BadRequest::new(place.path.key("address").to_string(), "is missing"))?;
    Ok(BackendEntry {
        host: host(&text(&address)?).map_err(|problem| address.refuse(problem))?,
        port: given(place.path.key("port"), &wire.port)
            .map(|port| integer(&port, PORTS))
            .transpose()?
            .and_then(as_port),
        weight: given(place.path.key("weight"), &wire.weight)
            .map_or(Ok(1), |weight| integer(&weight, 0..=WEIGHT_MAX))?,
    })
}

/// `HOST[:PORT] [weight=N]`
fn backend_from_text(place: &Field) -> Result<BackendEntry, BadRequest> {
    let line = text(place)?;
    let mut words = line.split_whitespace();
    let first = words.next().unwrap_or_default();
    let (address, port) = split_host_port(first);
    let refuse = |key, value: &str, problem: String| {
        Field::owned(place.path.key(key), value).refuse(problem)
    };
    let mut weight = None;
    for word in words {
        let value = word.strip_prefix("weight=").filter(|_| weight.is_none());
        let value =
            value.ok_or_else(|| place.refuse("is not of the form HOST[:PORT] [weight=N]"))?;
        let given = integer_in(value, 0..=WEIGHT_MAX);
        weight = Some(given.map_err(|problem| refuse("weight", value, problem))?);
    }
    let given = |port: &str| {
        let given = integer_in(port, PORTS);
        given.map_err(|problem| refuse("port", port, problem))
    };
    Ok(BackendEntry {
        host: host(address).map_err(|problem| refuse("address", address, problem.to_owned()))?,
        port: port.map(given).transpose()?.and_then(as_port),
        weight: weight.unwrap_or(1),
    })
}

/// The host and, if one is there, the port. A bare IPv6 address has none.
fn split_host_port(text: &str) -> (&str, Option<&str>) {
    if let Some((host, rest)) = text
        .strip_prefix('[')
        .and_then(|inner| inner.split_once(']'))
    {
        return match rest.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if rest.is_empty() => (host, None),
            None => (text, None),
        };
    }
    match text.split_once(':') {
        Some((host, port)) if !port.contains(':') => (host, Some(port)),
        _ => (text, None),
    }
}

/// The ports that a backend can have.
const PORTS: RangeInclusive<u32> = 1..=65_535;

fn as_port(number: u32) -> Option<u16> {
    u16::try_from(number).ok()
}

/// An address or a name, or what is wrong with it.
fn host(text: &str) -> Result<Host, &'static str> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return match unusable(address) {
            Some(reason) => Err(reason),
            None => Ok(Host::Address(address)),
        };
    }
    if split_host_port(text).1.is_some() {
        return Err("has a port in it; give that as `port`");
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
            && !label.starts_with('-')
    };
    let is_name = text.len() <= 253
        && text.trim_end_matches('.').split('.').all(label)
        && !text.trim_end_matches('.').split('.').all(is_number);
    match is_name {
        true => Ok(Host::Name(text.trim_end_matches('.').to_lowercase())),
        false => Err("is neither an IP address nor a hostname"),
    }
}

/// Whether a resolver would take a label for a number, as in `127.1` and
/// `0x7f000001`, which are old spellings of addresses.
fn is_number(label: &str) -> bool {
    let lower = label.to_lowercase();
    match lower.strip_prefix("0x") {
        Some(digits) => digits.bytes().all(|byte| byte.is_ascii_hexdigit()),
        None => lower.bytes().all(|byte| byte.is_ascii_digit()),
    }
}

/// Why nothing can be sent to an address, if so.
pub(super) fn unusable(address: IpAddr) -> Option<&'static str> {
    match address {
        _ if address.is_unspecified() => {
            Some("is the unspecified address, to which nothing can be sent")
        }
        _ if address.is_multicast() => Some("is a multicast address, not a server's"),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("is the broadcast address, not a server's"),
        IpAddr::V4(v4) if v4.octets()[0] == 0 => {
            Some("is in 0.0.0.0/8, to which nothing can be sent")
        }
        IpAddr::V4(v4) if v4.octets()[0] >= 240 => {
            Some("is in 240.0.0.0/4, which is reserved and not sent to")
        }
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            Some("is a link-local address, which a rule cannot name the link of")
        }
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            Some("is an IPv4 address in IPv6 form; write it as IPv4")
        }
        _ => None,
    }
}
