//! The balanced traffic: ports, networks, interfaces.

use ipnet::IpNet;
use serde_json::Value;

use super::coerce::{BadRequest, Field, all, integer, list, text};
use super::unchecked::RequestAttributes;
use super::{Destination, given};
use crate::host;
use crate::netfilter::{self, PortRange, Ports, Protocol};

/// The ports that are balanced. Services are looked up for the protocol.
pub(super) fn ports(place: &Field, protocol: Protocol) -> Result<Ports, BadRequest> {
    const MOST: usize = 15;
    let items = list(place)?;
    if items.len() == 0 {
        return Err(place.bad("is empty; \"0:65535\" is every port"));
    }
    if items.len() > MOST {
        return Err(place.bad(format!("has {} items, more than {MOST}", items.len())));
    }
    all(items.map(|item| port_range(&item, protocol))).map(Ports::new)
}

fn port_range(place: &Field, protocol: Protocol) -> Result<PortRange, BadRequest> {
    let text = match &*place.value {
        Value::Number(_) => integer(place, 1..=u32::from(u16::MAX))?.to_string().into(),
        _ => text(place)?,
    };
    let whole = text
        .split_once('.')
        .filter(|(_, zeros)| !zeros.is_empty() && zeros.bytes().all(|byte| byte == b'0'));
    match PortRange::parse(whole.map_or(&*text, |(digits, _)| digits)) {
        Some(PortRange { first: 0, last: 0 }) => Err(place.refuse(NO_PORT)),
        Some(range) => Ok(range),
        None => {
            let port = host::service_port(&text, protocol).ok_or_else(|| place.refuse(NO_PORT))?;
            Ok(PortRange {
                first: port,
                last: port,
            })
        }
    }
}

const NO_PORT: &str = "is neither a port, 1 to 65535, nor a range a:b of ports, ascending, nor a service in /etc/services";

pub(super) fn destination(attributes: &RequestAttributes) -> Result<Destination, BadRequest> {
    match given("destination", &attributes.destination) {
        None => Ok(Destination::Any),
        Some(place)
            if place
                .value
                .as_str()
                .is_some_and(|text| text.trim() == "local") =>
        {
            Ok(Destination::Local)
        }
        Some(_) => networks("destination", &attributes.destination).map(Destination::Networks),
    }
}

/// Networks without repetition, in the order given.
pub(super) fn networks(
    path: &'static str,
    value: &Option<Value>,
) -> Result<Vec<IpNet>, BadRequest> {
    let Some(place) = given(path, value) else {
        return Ok(Vec::new());
    };
    let mut found: Vec<IpNet> = Vec::new();
    for network in all(list(&place)?.map(|item| network(&item)))? {
        if !found.contains(&network) {
            found.push(network);
        }
    }
    match found.is_empty() {
        true => Err(place.bad("is empty; leave the attribute out instead")),
        false => Ok(found),
    }
}

fn network(place: &Field) -> Result<IpNet, BadRequest> {
    let text = text(place)?;
    netfilter::network(&text).ok_or_else(|| match &*text {
        "local" => place.bad("`local` stands alone, not beside other addresses"),
        _ => place.refuse("is not an IP address or network such as 192.0.2.0/24"),
    })
}

/// The name of an interface, in the characters that interfaces are named with
/// in practice: the kernel allows more, but iptables' own syntax does not.
pub(super) fn interface(
    path: &'static str,
    value: &Option<Value>,
) -> Result<Option<String>, BadRequest> {
    const MOST: usize = 15;
    let Some(place) = given(path, value) else {
        return Ok(None);
    };
    let name = text(&place)?;
    let stem = name.strip_suffix('+').unwrap_or(&name);
    let allowed =
        |byte: u8| byte.is_ascii_alphanumeric() || b"_.:@=~".contains(&byte) || byte == b'-';
    if stem.is_empty() {
        return Err(place.refuse("is every interface; leave the attribute out instead"));
    }
    if name.len() > MOST || !stem.bytes().all(allowed) || stem.starts_with('-') {
        return Err(place.refuse(format_args!("is not the name of an interface (up to {MOST} of A-Z a-z 0-9 _ . : @ = ~ -, and a trailing + for any ending)")));
    }
    Ok(Some(name.into_owned()))
}
