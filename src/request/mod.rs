//! What is asked for: [`wire`] has the shapes that arrive, [`Request`] is what
//! is true after checking. One conversion words every error; after it nobody
//! checks again.

mod backend;
mod coerce;
pub mod json;
mod name;
mod pool;
mod traffic;
pub(crate) mod wire;

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use crate::net::{Family, Ports, Protocol};
pub use backend::Backend;
use backend::backends;
pub use coerce::BadRequest;
use coerce::{Place, boolean, choice, integer, list, text};
pub use name::Name;
pub use pool::Pool;
use pool::pools;
use traffic::{destination, interface, networks, ports};
use wire::Wire;
pub use wire::{Disconnect, Jump, Layout, Masquerade, Mode, State, VariantChoice, WhenEmpty};

/// The largest weight: 2^31 - 1.
pub const WEIGHT_MAX: u32 = i32::MAX.unsigned_abs();

/// A checked request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The chain that it is about.
    pub name: Name,
    /// What is to be there.
    pub wanted: Wanted,
    /// Which iptables.
    pub variant: VariantChoice,
    /// How long to wait for others' locks, in seconds.
    pub wait: u32,
}

/// What is to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing of the balancer.
    Absent,
    /// This balancer.
    Present(Balancer),
}

/// A balancer that can be built: every family in use has a weight, and the
/// networks named are of the families in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balancer {
    /// In turn or by chance.
    pub mode: Mode,
    /// The families that have backends, in order.
    pub pools: Vec<Pool>,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The ports that are balanced.
    pub destination_ports: Ports,
    /// The addresses that are balanced.
    pub destination: Destination,
    /// Only from these networks; from everywhere when empty.
    pub sources: Vec<IpNet>,
    /// Only from this interface.
    pub in_interface: Option<String>,
    /// Where a new jump goes.
    pub jump: Jump,
}

/// To whom a connection must be addressed to be balanced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// To anybody.
    Any,
    /// To any address of this host.
    Local,
    /// To one of these networks.
    Networks(Vec<IpNet>),
}

impl Request {
    /// Checks what arrived.
    ///
    /// # Errors
    /// The first thing that is wrong: the attribute, the item, and the way out.
    pub fn from_json(attributes: json::Object) -> Result<Self, BadRequest> {
        let wire = Wire::from_json(attributes)?;
        let wait = match given("wait", &wire.wait) {
            Some(place) => integer(&place, 0..=3600)?,
            None => 10,
        };
        Ok(Self {
            name: name(&wire)?,
            variant: word("variant", &wire.variant, VariantChoice::WORDS)?,
            wait,
            wanted: wanted(&wire)?,
        })
    }
}

/// Reads a boolean that a front end has of its own, such as `check`.
///
/// # Errors
/// When it is none, in words that name it.
pub fn flag(name: &str, value: &Value) -> Result<bool, BadRequest> {
    boolean(&Place::new(name, value.clone()))
}

impl Wire {
    fn from_json(attributes: json::Object) -> Result<Self, BadRequest> {
        let is_there = |name: &str| given(name, attributes.get(name)).is_some();
        if is_there("name") && is_there("chain") {
            return Err(BadRequest::new(
                "chain",
                "`name` is given too, of which it is another spelling; leave one out",
            ));
        }
        let attributes = attributes
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .collect();
        shaped("", attributes)
    }
}

/// An attribute that is there; null counts as left out, as Ansible has it.
fn given<'a>(path: &str, value: impl Into<Option<&'a Value>>) -> Option<Place> {
    value
        .into()
        .filter(|value| !value.is_null())
        .map(|value| Place::new(path, value.clone()))
}

/// An object into its shape: every key is known, the values are not yet looked at.
fn shaped<T>(path: &str, object: json::Object) -> Result<T, BadRequest>
where
    T: for<'de> Deserialize<'de> + schemars::JsonSchema,
{
    let object = Value::Object(object);
    T::deserialize(&object).map_err(|error| misshapen::<T>(path, &object, &error))
}

/// The only thing that can be wrong with a shape is a key that it has not.
fn misshapen<T: schemars::JsonSchema>(
    path: &str,
    object: &Value,
    error: &serde_json::Error,
) -> BadRequest {
    let known = names_of::<T>();
    let mut keys = object.as_object().into_iter().flat_map(json::Object::keys);
    match keys.find(|key| !known.contains(key)) {
        None => BadRequest::new(path, error.to_string()),
        Some(key) => {
            let dot = if path.is_empty() { "" } else { "." };
            BadRequest::new(
                format!("{path}{dot}{}", key.escape_debug()),
                unknown(key, &known),
            )
        }
    }
}

/// The names that a shape has, with their aliases, from its schema.
fn names_of<T: schemars::JsonSchema>() -> Vec<String> {
    let schema = schemars::schema_for!(T);
    let properties = schema.get("properties").and_then(Value::as_object);
    let mut names = Vec::new();
    for (name, property) in properties.into_iter().flatten() {
        names.push(name.clone());
        let aliases = property.get("aliases").and_then(Value::as_array);
        names.extend(
            aliases
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned),
        );
    }
    names
}

fn unknown(key: &str, known: &[String]) -> String {
    let distance = |name: &&String| strsim::damerau_levenshtein(&key.to_lowercase(), name);
    match known.iter().min_by_key(distance) {
        Some(nearest) => format!("there is no such attribute; the nearest is `{nearest}`"),
        None => "there is no such attribute".into(),
    }
}

fn name(wire: &Wire) -> Result<Name, BadRequest> {
    let place = given("name", &wire.name)
        .ok_or_else(|| BadRequest::new("name", "is missing; it names the chain"))?;
    Name::new(&text(&place)?).map_err(|problem| place.refuse(problem))
}

/// One of the words of an enum, or its default.
fn word<T: Copy + Default>(
    path: &str,
    value: &Option<Value>,
    words: &[(&str, T)],
) -> Result<T, BadRequest> {
    given(path, value).map_or(Ok(T::default()), |place| choice(&place, words))
}

fn optional_flag(path: &str, value: &Option<Value>) -> Result<bool, BadRequest> {
    given(path, value).map_or(Ok(false), |place| boolean(&place))
}

/// Everything given is checked in either state; what `absent` does not need is
/// not asked for.
fn wanted(wire: &Wire) -> Result<Wanted, BadRequest> {
    let state = word("state", &wire.state, State::WORDS)?;
    let backends = given("backends", &wire.backends)
        .map(|place| backends(&place))
        .transpose()?;
    let ports = given("destination_port", &wire.destination_port)
        .map(|place| ports(&place))
        .transpose()?;
    let mut balancer = Balancer {
        mode: word("mode", &wire.mode, Mode::WORDS)?,
        protocol: word("protocol", &wire.protocol, &Protocol::WORDS)?,
        destination: destination(wire)?,
        sources: networks("source", &wire.source)?,
        in_interface: interface("in_interface", &wire.in_interface)?,
        jump: word("jump", &wire.jump, Jump::WORDS)?,
        destination_ports: Ports::default(),
        pools: Vec::new(),
    };
    let layout = word("layout", &wire.layout, Layout::WORDS)?;
    let not_yet = gateway(wire)?;
    let persist = asks_to_persist(&wire.persist)?.then_some("persist");
    match state {
        State::Absent => match persist {
            Some(path) => Err(not_available(path)),
            None => Ok(Wanted::Absent),
        },
        State::Present => {
            let Some(backends) = backends else {
                return Err(BadRequest::new(
                    "backends",
                    "is missing; it lists the servers",
                ));
            };
            let Some(ports) = ports else {
                let problem = "is missing; it says what is balanced, and \"0:65535\" is every port";
                return Err(BadRequest::new("destination_port", problem));
            };
            if let Some(path) = not_yet.or(persist) {
                return Err(not_available(path));
            }
            balancer.destination_ports = ports;
            balancer.pools = pools(&backends, balancer.mode, layout)?;
            balancer.check_networks()?;
            Ok(Wanted::Present(balancer))
        }
    }
}

/// The attributes of the gateway around the chain: read and checked, and the
/// first that asks for an effect, which none has yet.
fn gateway(wire: &Wire) -> Result<Option<&'static str>, BadRequest> {
    let masquerade = match given("masquerade", &wire.masquerade) {
        None => Masquerade::No,
        Some(place) => match coerce::as_boolean(&place.value) {
            Some(true) => Masquerade::Balanced,
            Some(false) => Masquerade::No,
            None => choice(&place, Masquerade::WORDS)?,
        },
    };
    let snat = given("snat_address", &wire.snat_address)
        .map(|place| snat_addresses(&place))
        .transpose()?;
    let out_interface = interface("out_interface", &wire.out_interface)?;
    if masquerade == Masquerade::All && out_interface.is_none() {
        return Err(BadRequest::new(
            "out_interface",
            "is missing; `masquerade: all` needs it",
        ));
    }
    if snat.is_some() && masquerade == Masquerade::No {
        return Err(BadRequest::new(
            "snat_address",
            "says how to masquerade, but `masquerade` is `no`",
        ));
    }
    word("when_empty", &wire.when_empty, WhenEmpty::WORDS)?;
    let asked = [
        (
            "local_traffic",
            optional_flag("local_traffic", &wire.local_traffic)?,
        ),
        ("masquerade", masquerade != Masquerade::No),
        ("out_interface", out_interface.is_some()),
        ("forward", optional_flag("forward", &wire.forward)?),
        ("ip_forward", optional_flag("ip_forward", &wire.ip_forward)?),
        (
            "disconnect",
            word("disconnect", &wire.disconnect, Disconnect::WORDS)? == Disconnect::Always,
        ),
    ];
    Ok(asked
        .into_iter()
        .find(|(_, asked)| *asked)
        .map(|(path, _)| path))
}

fn not_available(path: &str) -> BadRequest {
    BadRequest::new(path, "is not available yet in this version; leave it out")
}

fn asks_to_persist(value: &Option<Value>) -> Result<bool, BadRequest> {
    let Some(place) = given("persist", value) else {
        return Ok(false);
    };
    let is_path = |value: &Value| {
        value
            .as_str()
            .is_some_and(|text| text.starts_with('/') && !text.contains(char::is_control))
    };
    match &place.value {
        Value::Object(paths) => {
            for (family, path) in paths {
                let place = Place::new(format!("persist.{family}"), path.clone());
                if !["ipv4", "ipv6"].contains(&family.as_str()) {
                    return Err(place.bad("is neither `ipv4` nor `ipv6`"));
                }
                if !is_path(path) {
                    return Err(place.refuse("is not an absolute path"));
                }
            }
            Ok(!paths.is_empty())
        }
        value if is_path(value) => Ok(true),
        value => coerce::as_boolean(value).ok_or_else(|| {
            place.refuse("is neither a boolean, an absolute path, nor {ipv4: path, ipv6: path}")
        }),
    }
}

fn snat_addresses(place: &Place) -> Result<Vec<IpAddr>, BadRequest> {
    let mut found: Vec<IpAddr> = Vec::new();
    for item in list(place)? {
        let address = text(&item)?
            .parse()
            .map_err(|_| item.refuse("is not an IP address"))?;
        if found
            .iter()
            .any(|other| Family::of(*other) == Family::of(address))
        {
            return Err(item.refuse("is the second address of its family; one for each is used"));
        }
        found.push(address);
    }
    Ok(found)
}

impl Balancer {
    /// A network of a family without backends, or backends of a family that no
    /// network is of, would silently get nothing.
    fn check_networks(&self) -> Result<(), BadRequest> {
        if let Destination::Networks(networks) = &self.destination {
            self.check_families("destination", networks)?;
        }
        self.check_families("source", &self.sources)?;
        self.check_combinations()
    }

    /// One rule leads into the chain for each combination of the networks.
    fn check_combinations(&self) -> Result<(), BadRequest> {
        const MOST: usize = 4096;
        let destinations = match &self.destination {
            Destination::Networks(networks) => networks.len(),
            Destination::Any | Destination::Local => 1,
        };
        let combinations = destinations.saturating_mul(self.sources.len().max(1));
        if combinations <= MOST {
            return Ok(());
        }
        let problem = format!(
            "with `destination` these are {combinations} combinations, more than {MOST}; name larger networks"
        );
        Err(BadRequest::new("source", problem))
    }

    fn check_families(&self, path: &str, networks: &[IpNet]) -> Result<(), BadRequest> {
        let family_of = |network: &IpNet| Family::of(network.addr());
        for (at, network) in networks.iter().enumerate() {
            let family = family_of(network);
            if !self.pools.iter().any(|pool| pool.family == family) {
                let problem = format!(
                    "`{network}` is {}, but no backend is; add one or leave it out",
                    family.title()
                );
                return Err(BadRequest::new(format!("{path}[{at}]"), problem));
            }
        }
        for family in self.pools.iter().map(|pool| pool.family) {
            if !networks.is_empty() && !networks.iter().any(|network| family_of(network) == family)
            {
                let problem = format!(
                    "names no {0} network, but there are {0} backends, which would get nothing",
                    family.title()
                );
                return Err(BadRequest::new(path, problem));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::too_many_lines)]
mod tests;
