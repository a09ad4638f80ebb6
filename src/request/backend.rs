//! Backends, in each form in which they are written.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use serde_json::Value;

use super::coerce::{BadRequest, Field, Mistakes, all, boolean, integer, integer_in, list, text};
use super::pool::gcd;
use super::service::{Service, Verdict};
use super::unchecked::BackendAttributes;
use super::{WEIGHT_MAX, given, json, shaped};
use crate::netfilter::Endpoint;

/// A backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its address and port; without a port connections keep theirs.
    pub endpoint: Endpoint,
    /// Its part, 0 to 2^31 - 1, while it is in service.
    pub weight: u32,
    /// It is in service only while no other is.
    pub backup: bool,
    /// The place that was decided for it.
    pub service: Service,
    /// The result of its health checks, where there are any.
    pub health: Option<Verdict>,
}

/// One item of the list. Its host may have several addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BackendEntry {
    pub host: Host,
    pub port: Option<u16>,
    pub weight: u32,
    pub backup: bool,
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
    /// A backend in service, and no backup.
    #[must_use]
    pub fn new(endpoint: Endpoint, weight: u32) -> Self {
        Self {
            endpoint,
            weight,
            backup: false,
            service: Service::default(),
            health: None,
        }
    }

    /// Returns true if it gets new connections.
    #[must_use]
    pub fn is_in_service(&self) -> bool {
        self.service == Service::InService
    }

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
    let found = all(list(place)?.map(|item| backend(&item)));
    let found = found.map_err(|bad| match whole_weights(place) {
        Some(weights) => bad.with_way_out(&format!(
            "the same proportions in whole weights are {weights}"
        )),
        None => bad,
    })?;
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

/// Whole weights in the proportions of the list, if it has fractions such as
/// `0.5`, at most six decimals: `1, 2` for 0.5 and 1.
fn whole_weights(place: &Field) -> Option<String> {
    const SHOWN: usize = 12;
    const SCALE: u128 = 1_000_000;
    let weights: Option<Vec<u128>> = list(place).ok()?.map(|item| millionths(&item)).collect();
    let weights = weights?;
    if weights.iter().all(|weight| weight % SCALE == 0) {
        return None;
    }
    let divisor = weights
        .iter()
        .fold(0, |so_far, weight| gcd(so_far, *weight))
        .max(1);
    let mut shown: Vec<String> = weights
        .iter()
        .take(SHOWN)
        .map(|weight| (weight / divisor).to_string())
        .collect();
    if weights.len() > SHOWN {
        shown.push("...".to_owned());
    }
    Some(shown.join(", "))
}

/// The weight of an item in millionths.
fn millionths(item: &Field) -> Option<u128> {
    let text = match &*item.value {
        Value::Object(object) => match object.get("weight") {
            None | Some(Value::Null) => "1".to_owned(),
            Some(Value::String(text)) => text.trim().to_owned(),
            Some(other) => other.to_string(),
        },
        Value::String(text) => {
            let mut words = text.split_whitespace();
            let weight = words.find_map(|word| word.strip_prefix("weight="));
            weight.unwrap_or("1").to_owned()
        }
        _ => return None,
    };
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let is_number = |part: &str| part.len() <= 6 && part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !is_number(whole) || !is_number(fraction) {
        return None;
    }
    format!("{whole}{fraction:0<6}").parse().ok()
}

/// IPv6 addresses without brackets whose last group may be meant as a port:
/// `fd00::1:80`, where no other backend is without a port.
pub(super) fn ambiguous_ports(listed: &[BackendEntry], place: &Field) -> Vec<String> {
    let is_bare_ipv6 = |entry: &BackendEntry| {
        entry.port.is_none() && matches!(entry.host, Host::Address(IpAddr::V6(_)))
    };
    if !listed.iter().any(is_bare_ipv6) {
        return Vec::new();
    }
    let Ok(items) = list(place) else {
        return Vec::new();
    };
    let texts: Vec<Option<String>> = items
        .map(|item| item.value.as_str().map(str::to_owned))
        .collect();
    let is_ambiguous = |at: usize| -> Option<String> {
        let text = texts
            .get(at)?
            .as_deref()?
            .split_whitespace()
            .next()?
            .to_owned();
        let (_, tail) = text.split_once("::")?;
        let (_, last) = tail.rsplit_once(':')?;
        let is_port = last.bytes().all(|byte| byte.is_ascii_digit())
            && last.parse::<u16>().is_ok_and(|port| port > 0);
        let has_port = |entry: &BackendEntry| entry.port.is_some();
        let mut others = listed.iter().enumerate().filter(|(other, _)| *other != at);
        let is_alone = others.all(|(_, entry)| has_port(entry));
        (is_port && is_alone && !has_port(&listed[at]) && !text.starts_with('[')).then_some(text)
    };
    let found = (0..listed.len()).filter_map(|at| Some((at, is_ambiguous(at)?)));
    found
        .map(|(at, text)| {
            let (address, port) = text.rsplit_once(':').unwrap_or((&text, ""));
            format!(
                "backends[{at}]: `{text}` is an address without a port; if {port} is meant as its port, write `[{address}]:{port}`"
            )
        })
        .collect()
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
        _ => Err(place.refuse(format_args!(
            "is neither an object {{address, port, weight, backup}} nor a string {FORM}"
        ))),
    }
}

fn backend_from_object(place: &Field, object: &json::Object) -> Result<BackendEntry, BadRequest> {
    let attributes: BackendAttributes = shaped(&place.path, object)?;
    let address = given(place.path.key("address"), &attributes.address)
        .ok_or_else(|| BadRequest::new(place.path.key("address").to_string(), "is missing"))?;
    let host = |address: &Field| host(&text(address)?).map_err(|problem| address.refuse(problem));
    let port = given(place.path.key("port"), &attributes.port);
    let port = port.map(|port| integer(&port, PORTS)).transpose();
    let weight = given(place.path.key("weight"), &attributes.weight);
    let weight = weight.map_or(Ok(1), |weight| integer(&weight, 0..=WEIGHT_MAX));
    let backup = given(place.path.key("backup"), &attributes.backup);
    let backup = backup.map_or(Ok(false), |backup| boolean(&backup));
    let mut mistakes = Mistakes::default();
    let host = mistakes.take(host(&address));
    let port = mistakes.take(port);
    let weight = mistakes.take(weight);
    let backup = mistakes.take(backup).unwrap_or_default();
    mistakes.or(host
        .zip(port)
        .zip(weight)
        .map(|((host, port), weight)| BackendEntry {
            host,
            port: port.and_then(as_port),
            weight,
            backup,
        }))
}

/// The words of a backend that is written as text.
const FORM: &str = "HOST[:PORT] [weight=N] [backup]";

/// [`FORM`]
fn backend_from_text(place: &Field) -> Result<BackendEntry, BadRequest> {
    let line = text(place)?;
    if line.contains("://") {
        return Err(place.refuse("is a URL; a backend is HOST[:PORT]"));
    }
    let mut words = line.split_whitespace();
    let first = words.next().unwrap_or_default();
    let (address, port) = split_host_port(first);
    let refuse = |key, value: &str, problem: String| {
        Field::owned(place.path.key(key), value).refuse(problem)
    };
    let (mut weight, mut backup) = (None, false);
    for word in words {
        if word == "backup" && !backup {
            backup = true;
            continue;
        }
        let value = word.strip_prefix("weight=").filter(|_| weight.is_none());
        let value = value.ok_or_else(|| place.refuse(format_args!("is not of the form {FORM}")))?;
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
        backup,
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

/// An address or a name, or the reason why it is neither.
fn host(text: &str) -> Result<Host, &'static str> {
    if text.contains("://") {
        return Err("is a URL; give its host here, and its port as `port`");
    }
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

/// Returns true for a label that a resolver would take for a number, as in
/// `127.1` and `0x7f000001`, old spellings of addresses.
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
