//! Requests: [`unchecked`] has the attributes as they arrive, [`Request`] is
//! valid. One conversion words every error; after it nobody checks again.

mod backend;
mod coerce;
mod gateway;
pub mod json;
mod pool;
mod traffic;
pub(crate) mod unchecked;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

pub use crate::netfilter::Name;
use crate::netfilter::{self, Family, Ports, Protocol};
pub use backend::Backend;
use backend::{BackendEntry, ambiguous_ports, backends};
pub use coerce::BadRequest;
use coerce::{Field, Mistakes, Path, all, boolean, choice, integer, text};
pub use gateway::{Gateway, Masquerading, Persist};
use gateway::{gateway, persist};
pub use pool::Pool;
use pool::pools;
use traffic::{destination, interface, networks, ports as ports_of};
use unchecked::RequestAttributes;
pub use unchecked::{
    DesiredState, Disconnect, Jump, Layout, Masquerade, Mode, VariantChoice, WhenEmpty,
};

/// The largest weight: 2^31 - 1.
pub const WEIGHT_MAX: u32 = i32::MAX.unsigned_abs();

/// A checked request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The chain that it is about.
    pub name: Name,
    /// The desired state.
    pub desired: Desired,
    /// The iptables variant.
    pub variant: VariantChoice,
    /// The time to wait for locks, in seconds.
    pub wait: u32,
    /// The files for the next boot.
    pub persist: Persist,
    /// The protocols whose connections are ended when their backend is removed.
    pub disconnect: Disconnect,
    /// Warnings about values that may be meant otherwise.
    pub warnings: Vec<String>,
}

/// A request of which so much is read as one must know to find the host's rules.
/// The rest is still to be checked, which may take long: of ten thousand
/// backends, or when names have to be looked up.
#[derive(Clone, Debug)]
pub struct UncheckedRequest {
    /// The chain that it is about.
    pub name: Name,
    /// The desired state.
    pub state: DesiredState,
    /// The iptables variant.
    pub variant: VariantChoice,
    /// The time to wait for locks, in seconds.
    pub wait: u32,
    attributes: RequestAttributes,
}

/// The desired state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Desired {
    /// Nothing of the balancer.
    Absent,
    /// This balancer.
    Present(Balancer),
}

/// A balancer that can be built: the networks and addresses named are of the
/// families in use.
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
    /// The position of a new jump rule.
    pub jump: Jump,
    /// The gateway around the chain.
    pub gateway: Gateway,
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

/// Finds the addresses of a host's name, or says why it has none.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Result<Vec<IpAddr>, String>;

impl UncheckedRequest {
    /// Reads the attributes that are needed to find the host's rules.
    ///
    /// # Errors
    /// For unknown attributes, and where one of these is wrong. Then the mistakes
    /// in the other attributes are named too.
    pub fn from_json(attributes: json::Object) -> Result<Self, BadRequest> {
        let (attributes, mut mistakes) = RequestAttributes::from_json(attributes);
        let are_names_known = mistakes.is_empty();
        let wait = given("wait", &attributes.wait);
        let wait = mistakes.take(wait.map_or(Ok(10), |place| integer(&place, 0..=3600)));
        let name = mistakes.take(name(&attributes));
        let state = mistakes.take(word("state", &attributes.state, DesiredState::WORDS));
        let variant = mistakes.take(word("variant", &attributes.variant, VariantChoice::WORDS));
        if mistakes.is_empty() {
            let basics = name.zip(state).zip(variant).zip(wait);
            let unchecked = basics.map(|(((name, state), variant), wait)| Self {
                name,
                state,
                variant,
                wait,
                attributes,
            });
            return mistakes.or(unchecked);
        }
        // An attribute with an unknown name may be the one that seems to be missing.
        let state = state.filter(|_| are_names_known);
        let state = state.unwrap_or(DesiredState::Absent);
        mistakes.take(desired(&attributes, state));
        mistakes.take(persist(&attributes.persist));
        mistakes.take(word(
            "disconnect",
            &attributes.disconnect,
            Disconnect::WORDS,
        ));
        mistakes.take(word("layout", &attributes.layout, Layout::WORDS));
        mistakes.or(None)
    }

    /// Checks everything except the addresses of names.
    ///
    /// # Errors
    /// Up to five mistakes: the attribute, the item, and the way out.
    pub fn check(&self) -> Result<(), BadRequest> {
        let checked = self.checked()?;
        match checked.listed.iter().any(|listed| listed.host.is_name()) {
            true => Ok(()),
            false => checked.resolve(&no_names).map(|_| ()),
        }
    }

    /// The request, with addresses in the place of names.
    ///
    /// # Errors
    /// As [`Self::check`], and when a name has no address.
    pub fn resolve(&self, lookup: Lookup) -> Result<Request, BadRequest> {
        self.checked()?.resolve(lookup)
    }

    fn checked(&self) -> Result<Checked, BadRequest> {
        let attributes = &self.attributes;
        let mut mistakes = Mistakes::default();
        let desired = mistakes.take(desired(attributes, self.state));
        let persist = mistakes.take(persist(&attributes.persist));
        let disconnect = word("disconnect", &attributes.disconnect, Disconnect::WORDS);
        let disconnect = mistakes.take(disconnect).unwrap_or_default();
        let layout = mistakes.take(word("layout", &attributes.layout, Layout::WORDS));
        let (desired, listed) = mistakes.or(desired)?;
        let ambiguous = |place| ambiguous_ports(&listed, &place);
        let warnings = given("backends", &attributes.backends).map(ambiguous);
        Ok(Checked {
            request: Request {
                name: self.name.clone(),
                variant: self.variant,
                wait: self.wait,
                desired,
                persist: persist.unwrap_or_default(),
                disconnect,
                warnings: warnings.unwrap_or_default(),
            },
            listed,
            layout: layout.unwrap_or_default(),
        })
    }
}

/// A request without backends, and the list that they are made from.
struct Checked {
    request: Request,
    listed: Vec<BackendEntry>,
    layout: Layout,
}

impl Checked {
    fn resolve(self, lookup: Lookup) -> Result<Request, BadRequest> {
        let mut request = self.request;
        let Desired::Present(balancer) = &mut request.desired else {
            return Ok(request);
        };
        let named = balancer.families_named();
        balancer.pools = pools(&self.listed, &named, balancer.mode, self.layout, lookup)?;
        balancer.check_networks()?;
        balancer.check_snat()?;
        check_persist(&request.persist, balancer)?;
        Ok(request)
    }
}

fn no_names(_: &str) -> Result<Vec<IpAddr>, String> {
    Err("names are not looked up here".to_owned())
}

impl Request {
    /// Checks a request that names no host.
    ///
    /// # Errors
    /// As [`UncheckedRequest::from_json`], and for a hostname.
    pub fn from_json(attributes: json::Object) -> Result<Self, BadRequest> {
        UncheckedRequest::from_json(attributes)?.resolve(&no_names)
    }

    /// The desired state by its name.
    #[must_use]
    pub fn state(&self) -> DesiredState {
        match self.desired {
            Desired::Absent => DesiredState::Absent,
            Desired::Present(_) => DesiredState::Present,
        }
    }

    /// The balancer, if there is to be one.
    #[must_use]
    pub fn balancer(&self) -> Option<&Balancer> {
        match &self.desired {
            Desired::Absent => None,
            Desired::Present(balancer) => Some(balancer),
        }
    }
}

/// Reads a boolean that a front end has of its own, such as `check`.
///
/// # Errors
/// When it is none, in words that name it.
pub fn flag(name: &str, value: &Value) -> Result<bool, BadRequest> {
    boolean(&Field::new(name, value))
}

impl RequestAttributes {
    /// The known attributes, and the mistakes in the names of others.
    fn from_json(mut attributes: json::Object) -> (Self, Mistakes) {
        let mut mistakes = Mistakes::default();
        attributes.retain(|_, value| !value.is_null());
        if attributes.contains_key("name") && attributes.remove("chain").is_some() {
            mistakes.add(BadRequest::new(
                "chain",
                "`name` is given too, of which it is another spelling; leave one out",
            ));
        }
        // It may be long, and is not copied.
        let backends = attributes.remove("backends");
        let rest = match Self::deserialize(&attributes) {
            Ok(rest) => rest,
            Err(error) => {
                mistakes.add(misshapen::<Self>(&"".into(), &attributes, &error));
                let known = names_of::<Self>();
                attributes.retain(|name, _| known.contains(name));
                Self::deserialize(&attributes).unwrap_or_default()
            }
        };
        (Self { backends, ..rest }, mistakes)
    }
}

/// An attribute that is there; null counts as left out, as Ansible has it.
fn given<'a>(path: impl Into<Path<'a>>, value: impl Into<Option<&'a Value>>) -> Option<Field<'a>> {
    value
        .into()
        .filter(|value| !value.is_null())
        .map(|value| Field::new(path, value))
}

/// An object into its shape: every key is known, the values are unchecked.
fn shaped<T>(path: &Path, object: &json::Object) -> Result<T, BadRequest>
where
    T: for<'de> Deserialize<'de> + schemars::JsonSchema,
{
    T::deserialize(object).map_err(|error| misshapen::<T>(path, object, &error))
}

/// The only possible mistake in a shape is an unknown key. All are named.
fn misshapen<T: schemars::JsonSchema>(
    path: &Path,
    object: &json::Object,
    error: &serde_json::Error,
) -> BadRequest {
    let known = names_of::<T>();
    let path = path.to_string();
    let dot = if path.is_empty() { "" } else { "." };
    let unknown_keys = object.keys().filter(|key| !known.contains(key));
    let mistakes = all(unknown_keys.map(|key| {
        let place = format!("{path}{dot}{}", key.escape_debug());
        Err::<(), _>(BadRequest::new(place, unknown(key, &known)))
    }));
    match mistakes {
        Err(mistakes) => mistakes,
        Ok(_) => BadRequest::new(path, error.to_string()),
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

/// Names that other programs use, and the attribute that is meant.
const SYNONYMS: [(&str, &str); 20] = [
    ("port", "destination_port"),
    ("ports", "destination_port"),
    ("dport", "destination_port"),
    ("dports", "destination_port"),
    ("listen", "destination_port"),
    ("bind", "destination"),
    ("vip", "destination"),
    ("server", "backends"),
    ("servers", "backends"),
    ("upstream", "backends"),
    ("members", "backends"),
    ("targets", "backends"),
    ("balance", "mode"),
    ("algorithm", "mode"),
    ("scheduler", "mode"),
    ("lb_algo", "mode"),
    ("interface", "in_interface"),
    ("iface", "in_interface"),
    ("snat", "masquerade"),
    ("host", "address"),
];

fn unknown(key: &str, known: &[String]) -> String {
    let key = key.to_lowercase();
    let is_known = |name: &str| known.iter().any(|known| known == name);
    let mut synonyms = SYNONYMS.iter();
    let meant = synonyms.find(|(other, name)| *other == key && is_known(name));
    if let Some((_, name)) = meant {
        return format!("there is no such attribute; it is called `{name}` here");
    }
    let mut longer = known
        .iter()
        .filter(|name| key.len() > 2 && name.starts_with(&key));
    if let (Some(name), None) = (longer.next(), longer.next()) {
        return format!("there is no such attribute; the nearest is `{name}`");
    }
    let distance = |name: &&String| strsim::damerau_levenshtein(&key, name);
    match known.iter().min_by_key(distance) {
        Some(nearest) => format!("there is no such attribute; the nearest is `{nearest}`"),
        None => "there is no such attribute".into(),
    }
}

fn name(attributes: &RequestAttributes) -> Result<Name, BadRequest> {
    let place = given("name", &attributes.name)
        .ok_or_else(|| BadRequest::new("name", "is missing; it names the chain"))?;
    Name::new(&text(&place)?).map_err(|problem| place.refuse(problem))
}

/// One of the words of an enum, or its default.
fn word<T: Copy + Default>(
    path: &'static str,
    value: &Option<Value>,
    words: &[(&str, T)],
) -> Result<T, BadRequest> {
    given(path, value).map_or(Ok(T::default()), |place| choice(&place, words))
}

fn optional_flag(path: &'static str, value: &Option<Value>) -> Result<bool, BadRequest> {
    given(path, value).map_or(Ok(false), |place| boolean(&place))
}

/// Every given attribute is checked in either state. What `absent` does not need
/// may be missing.
fn desired(
    attributes: &RequestAttributes,
    state: DesiredState,
) -> Result<(Desired, Vec<BackendEntry>), BadRequest> {
    let mut mistakes = Mistakes::default();
    let backends = given("backends", &attributes.backends).map(|place| backends(&place));
    let backends = mistakes.take(backends.transpose());
    let mode = mistakes.take(mode(&attributes.mode));
    let protocol = word("protocol", &attributes.protocol, &Protocol::WORDS);
    let protocol = mistakes.take(protocol).unwrap_or_default();
    let ports = given("destination_port", &attributes.destination_port);
    let ports = mistakes.take(ports.map(|place| ports_of(&place, protocol)).transpose());
    let destination = mistakes.take(destination(attributes));
    let sources = mistakes.take(networks("source", &attributes.source));
    let in_interface = mistakes.take(interface("in_interface", &attributes.in_interface));
    let jump = mistakes.take(word("jump", &attributes.jump, Jump::WORDS));
    let gateway = mistakes.take(gateway(attributes));
    if state == DesiredState::Absent {
        return mistakes.or(Some((Desired::Absent, Vec::new())));
    }
    if backends == Some(None) {
        let problem = "is missing; it lists the servers";
        mistakes.add(BadRequest::new("backends", problem));
    }
    if ports == Some(None) {
        let problem = "is missing; it says what is balanced, and \"0:65535\" is every port";
        mistakes.add(BadRequest::new("destination_port", problem));
    }
    let balancer = gateway.map(|gateway| Balancer {
        mode: mode.unwrap_or_default(),
        protocol,
        destination: destination.unwrap_or(Destination::Any),
        sources: sources.unwrap_or_default(),
        in_interface: in_interface.flatten(),
        jump: jump.unwrap_or_default(),
        destination_ports: ports.flatten().unwrap_or_default(),
        pools: Vec::new(),
        gateway,
    });
    let backends = backends.flatten().unwrap_or_default();
    mistakes.or(balancer.map(|balancer| (Desired::Present(balancer), backends)))
}

/// The mode. The names of other balancers' methods lead to the one that fits.
fn mode(value: &Option<Value>) -> Result<Mode, BadRequest> {
    let Some(place) = given("mode", value) else {
        return Ok(Mode::default());
    };
    choice(&place, Mode::WORDS).map_err(|bad| {
        let word = place.value.as_str().unwrap_or_default().to_lowercase();
        let word = word.replace(['-', '_', ' '], "");
        let hint = match word.as_str() {
            "roundrobin" | "rr" | "wrr" | "staticrr" | "weightedroundrobin" | "turn" => {
                "round robin, with weights, is `nth`"
            }
            "chance" | "probability" | "rand" => "that is `random`",
            "source" | "sourcehash" | "iphash" | "sticky" | "hash" | "consistent" => {
                "a client is not kept with a backend; the nearest is `random`"
            }
            "leastconn" | "leastconnections" | "lc" | "wlc" | "leastrequest" => {
                "iptables does not count a backend's connections; the nearest is `nth`"
            }
            _ => return bad,
        };
        place.refuse(format_args!("is not one of: nth, random; {hint}"))
    })
}

/// One file serves one family, so each family in use needs its own.
fn check_persist(persist: &Persist, balancer: &Balancer) -> Result<(), BadRequest> {
    let mut families = balancer.pools.iter().map(|pool| pool.family);
    match persist {
        Persist::Path(_) if balancer.pools.len() > 1 => Err(BadRequest::new(
            "persist",
            "one path serves one family, and both are in use; give {ipv4: path, ipv6: path}",
        )),
        Persist::Paths(paths) => match families.find(|family| !paths.contains_key(family)) {
            Some(family) => Err(BadRequest::new(
                format!("persist.{}", family.as_str()),
                format!("is missing; {} is in use too", family.title()),
            )),
            None => Ok(()),
        },
        Persist::No | Persist::Found | Persist::Path(_) => Ok(()),
    }
}

impl Balancer {
    /// The families that something other than a backend is of.
    fn families_named(&self) -> BTreeSet<Family> {
        let destinations = match &self.destination {
            Destination::Networks(networks) => networks.as_slice(),
            Destination::Any | Destination::Local => &[],
        };
        let networks = destinations.iter().chain(&self.sources);
        let mut named: BTreeSet<Family> =
            networks.map(|network| Family::of(network.addr())).collect();
        if let Some(masquerade) = &self.gateway.masquerade {
            named.extend(masquerade.addresses.keys());
        }
        named
    }

    fn check_snat(&self) -> Result<(), BadRequest> {
        let Some(masquerade) = &self.gateway.masquerade else {
            return Ok(());
        };
        let addresses: Vec<IpNet> = masquerade
            .addresses
            .values()
            .map(|address| IpNet::from(*address))
            .collect();
        self.check_families("snat_address", &addresses)
    }

    /// A network of a family without backends, or backends of a family that no
    /// network is of, would silently get nothing.
    fn check_networks(&self) -> Result<(), BadRequest> {
        if let Destination::Networks(networks) = &self.destination {
            self.check_families("destination", networks)?;
        }
        self.check_families("source", &self.sources)?;
        self.check_combinations()
    }

    /// One rule jumps into the chain for each combination of the networks.
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
                    "`{}` is {}, but no backend is; add one or leave it out",
                    netfilter::shortest(network),
                    family.title()
                );
                return Err(BadRequest::new(format!("{path}[{at}]"), problem));
            }
        }
        for family in self.pools.iter().map(|pool| pool.family) {
            if !networks.is_empty() && !networks.iter().any(|network| family_of(network) == family)
            {
                let problem = format!(
                    "names no {0} address, but there are {0} backends; name one, or leave those backends out",
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
