//! The gateway around the chain: source addresses, forwarding, boot.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path as FilePath, PathBuf};

use serde_json::Value;

use super::backend::unusable;
use super::coerce::{BadRequest, Field, Mistakes, Path, as_boolean, choice, list, text};
use super::unchecked::{Masquerade, RequestAttributes};
use super::{given, json};
use super::{optional_flag, traffic::interface, word};
use crate::netfilter::Family;
use crate::request::WhenEmpty;

/// The parts of a balancer beside the choice of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Also connections that this host makes itself.
    pub local_traffic: bool,
    /// The rewriting of source addresses.
    pub masquerade: Option<Masquerading>,
    /// Accept balanced connections in filter's FORWARD.
    pub forward: bool,
    /// Switch on forwarding in the kernel.
    pub ip_forward: bool,
    /// The answer to new connections when every backend has weight 0.
    pub when_empty: WhenEmpty,
}

/// A rewriting of source addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Masquerading {
    /// Rewrite everything that leaves by `out_interface`, not only balanced
    /// connections.
    pub all: bool,
    /// Rewrite only packets that leave by this interface.
    pub out_interface: Option<String>,
    /// To this address, one for each family in use; without any, to that of
    /// the interface.
    pub addresses: BTreeMap<Family, IpAddr>,
}

pub(super) fn gateway(attributes: &RequestAttributes) -> Result<Gateway, BadRequest> {
    let mut mistakes = Mistakes::default();
    let gateway = Gateway {
        local_traffic: mistakes
            .take(optional_flag("local_traffic", &attributes.local_traffic))
            .unwrap_or_default(),
        masquerade: mistakes.take(masquerading(attributes)).unwrap_or_default(),
        forward: mistakes
            .take(optional_flag("forward", &attributes.forward))
            .unwrap_or_default(),
        ip_forward: mistakes
            .take(optional_flag("ip_forward", &attributes.ip_forward))
            .unwrap_or_default(),
        when_empty: mistakes
            .take(word("when_empty", &attributes.when_empty, WhenEmpty::WORDS))
            .unwrap_or_default(),
    };
    mistakes.or(Some(gateway))
}

fn masquerading(attributes: &RequestAttributes) -> Result<Option<Masquerading>, BadRequest> {
    let scope = match given("masquerade", &attributes.masquerade) {
        None => Masquerade::No,
        Some(place) => match as_boolean(&place.value) {
            Some(true) => Masquerade::Balanced,
            Some(false) => Masquerade::No,
            None => choice(&place, Masquerade::WORDS)?,
        },
    };
    let addresses = given("snat_address", &attributes.snat_address)
        .map(|place| snat_addresses(&place))
        .transpose()?;
    let out_interface = interface("out_interface", &attributes.out_interface)?;
    let needless = |path: &str, what: &str| {
        Err(BadRequest::new(
            path,
            format!(
                "{what} `masquerade`, which is `no`; say `masquerade: balanced`, or leave it out"
            ),
        ))
    };
    match scope {
        Masquerade::No if addresses.is_some() => needless("snat_address", "is the address of"),
        Masquerade::No if out_interface.is_some() => needless("out_interface", "restricts"),
        Masquerade::No => Ok(None),
        Masquerade::All if out_interface.is_none() => Err(BadRequest::new(
            "out_interface",
            "is missing; `masquerade: all` needs it",
        )),
        Masquerade::All | Masquerade::Balanced => Ok(Some(Masquerading {
            all: scope == Masquerade::All,
            out_interface,
            addresses: addresses.unwrap_or_default(),
        })),
    }
}

fn snat_addresses(place: &Field) -> Result<BTreeMap<Family, IpAddr>, BadRequest> {
    let mut found = BTreeMap::new();
    for item in list(place)? {
        let address: IpAddr = text(&item)?
            .parse()
            .map_err(|_| item.refuse("is not an IP address"))?;
        if unusable(address).is_some() || address.is_loopback() {
            return Err(item.refuse("is no address that a connection can come from"));
        }
        if found.insert(Family::of(address), address).is_some() {
            return Err(item.refuse("is the second address of its family; one for each is used"));
        }
    }
    match found.is_empty() {
        true => Err(place.bad("is empty; leave the attribute out instead")),
        false => Ok(found),
    }
}

/// The files that keep the rules for the next boot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Persist {
    /// Nowhere.
    #[default]
    No,
    /// In the files that the distribution loads.
    Found,
    /// In this file, of the one family in use.
    Path(PathBuf),
    /// In these files.
    Paths(BTreeMap<Family, PathBuf>),
}

pub(super) fn persist(value: &Option<Value>) -> Result<Persist, BadRequest> {
    let Some(place) = given("persist", value) else {
        return Ok(Persist::No);
    };
    let object = match &*place.value {
        Value::Object(object) => Some(object.clone()),
        Value::String(text) if text.trim_start().starts_with('{') => {
            let parsed = json::parse(text.trim().as_bytes());
            let value = parsed.map_err(|error| place.refuse(format!("is not JSON: {error}")))?;
            value.as_object().cloned()
        }
        _ => None,
    };
    if let Some(paths) = object {
        return persist_paths(&paths);
    }
    if let Some(flag) = as_boolean(&place.value) {
        return Ok(if flag { Persist::Found } else { Persist::No });
    }
    let is_path = place.value.as_str().is_some_and(is_path);
    match (is_path, &*place.value) {
        (true, Value::String(path)) => Ok(Persist::Path(path.into())),
        _ => {
            Err(place
                .refuse("is neither a boolean, an absolute path, nor {ipv4: path, ipv6: path}"))
        }
    }
}

fn persist_paths(paths: &json::Object) -> Result<Persist, BadRequest> {
    let mut found = BTreeMap::new();
    for (name, path) in paths.iter().filter(|(_, path)| !path.is_null()) {
        let place = Field::new(Path::from("persist").key(name), path);
        let family = Family::BOTH
            .into_iter()
            .find(|family| family.as_str() == name)
            .ok_or_else(|| place.bad("is neither `ipv4` nor `ipv6`"))?;
        let path = path.as_str().filter(|path| is_path(path));
        let path = path.ok_or_else(|| place.refuse("is not an absolute path"))?;
        if found
            .values()
            .any(|other: &PathBuf| other == FilePath::new(path))
        {
            return Err(place.refuse("is the file of the other family too; each needs its own"));
        }
        found.insert(family, path.into());
    }
    match found.is_empty() {
        true => Ok(Persist::No),
        false => Ok(Persist::Paths(found)),
    }
}

/// Absolute, of a file, and on one line.
fn is_path(text: &str) -> bool {
    text.starts_with('/')
        && !text.ends_with('/')
        && !text.contains(char::is_control)
        && !text.split('/').any(|part| part == "..")
}
