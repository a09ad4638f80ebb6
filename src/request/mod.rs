//! Requests: [`unchecked`] has the attributes as they arrive, [`Request`] is
//! valid. One conversion words every error; after it nobody checks again.

mod backend;
mod balancer;
mod claims;
mod coerce;
mod gateway;
mod hash;
mod health;
pub mod json;
mod pool;
mod service;
mod set;
mod shape;
mod traffic;
pub(crate) mod unchecked;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::slice;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::netfilter::Family;
pub use crate::netfilter::Name;
pub use backend::Backend;
use backend::ambiguous_ports;
pub use balancer::{Balancer, Destination};
use balancer::{Draft, Inherited};
pub use claims::listed;
pub use coerce::BadRequest;
use coerce::{Field, Mistakes, Path, boolean, choice, integer, seconds, text};
use gateway::persist;
pub use gateway::{Gateway, Masquerading, Persist};
pub use hash::Hashing;
pub use health::{Check, Health, PanicThreshold};
use pool::Arranger;
pub use pool::Pool;
pub use service::{Circumstances, Known, Service, Verdict};
use set::SetDraft;
use shape::{misshapen, names_of, shaped};
use unchecked::RequestAttributes;
pub use unchecked::{
    CheckType, DesiredState, Disconnect, HashKey, Jump, Layout, Masquerade, Mode, VariantChoice,
    WhenEmpty,
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
    /// The protocols whose connections are ended when their backend is removed, of
    /// balancers that are not there any more.
    pub disconnect: Disconnect,
    /// The longest time to wait after a change for the connections of backends that
    /// are out of service.
    pub drain_timeout: Duration,
    /// Warnings about values that may be meant otherwise.
    pub warnings: Vec<String>,
}

/// A request with only the fields that are needed to read the host's rules.
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
    /// All attributes as they arrived, without `backends` and `balancers`.
    small: json::Object,
}

/// The desired state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Desired {
    /// Nothing of the balancer, or of the set.
    Absent,
    /// This balancer.
    Balancer(Box<Balancer>),
    /// These balancers, and no other of the set.
    Set(Vec<Balancer>),
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
        let (attributes, small, mut mistakes) = RequestAttributes::from_json(attributes);
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
                small,
            });
            return mistakes.or(unchecked);
        }
        // An attribute with an unknown name may be the one that seems to be missing.
        let state = state.filter(|_| are_names_known);
        let state = state.unwrap_or(DesiredState::Absent);
        match (given("balancers", &attributes.balancers), name) {
            (Some(place), Some(name)) => {
                mistakes.take(set::drafts(&attributes, &place, state, &name));
            }
            (Some(_), None) => {}
            (None, _) => {
                mistakes.take(Draft::read(&attributes, state));
            }
        }
        mistakes.take(persist(&attributes.persist));
        mistakes.take(drain_timeout(&attributes));
        if given("balancers", &attributes.balancers).is_none() {
            mistakes.take(word(
                "disconnect",
                &attributes.disconnect,
                Disconnect::WORDS,
            ));
            mistakes.take(word("layout", &attributes.layout, Layout::WORDS));
        }
        mistakes.or(None)
    }

    /// Reads the text of a request.
    ///
    /// # Errors
    /// When it is no JSON object, and as [`Self::from_json`].
    pub fn parse(text: &[u8]) -> Result<Self, BadRequest> {
        let bad = |problem: String| BadRequest::new("", format!("the request is {problem}"));
        match json::parse(text) {
            Ok(Value::Object(attributes)) => Self::from_json(attributes),
            Ok(_) => Err(bad("not a JSON object".to_owned())),
            Err(error) => Err(bad(format!("not JSON: {error}"))),
        }
    }

    /// The request as one line of JSON, with the attributes in the order of their names.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let large = [
            ("backends", &self.attributes.backends),
            ("balancers", &self.attributes.balancers),
        ];
        let large = large
            .into_iter()
            .filter_map(|(name, value)| Some((name, value.as_ref()?)));
        let small = self
            .small
            .iter()
            .map(|(name, value)| (name.as_str(), value));
        let all: BTreeMap<&str, &Value> = small.chain(large).collect();
        let mut text = serde_json::to_vec(&all).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Returns true if it is about a set of balancers.
    #[must_use]
    pub fn is_set(&self) -> bool {
        given("balancers", &self.attributes.balancers).is_some()
    }

    /// Returns true for a set whose balancers seem to have rules in filter, so that one
    /// dump of all tables is less than one of each.
    #[must_use]
    pub fn mentions_filter(&self) -> bool {
        let is_said = |item: &Value| match item {
            Value::Object(item) => item.contains_key("forward"),
            Value::String(text) => text.contains("\"forward\""),
            _ => false,
        };
        let is_default = given("forward", &self.attributes.forward).is_some();
        match &self.attributes.balancers {
            None | Some(Value::Null) => false,
            Some(Value::Array(items)) => is_default || items.iter().any(is_said),
            Some(Value::Object(items)) => is_default || items.values().any(is_said),
            Some(text) => is_default || is_said(text),
        }
    }

    /// Checks everything except the addresses of names.
    ///
    /// # Errors
    /// Up to five mistakes: the attribute, the item, and the way out.
    pub fn check(&self) -> Result<(), BadRequest> {
        let checked = self.checked()?;
        match checked.has_names() {
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
        let drafts = match given("balancers", &attributes.balancers) {
            None => {
                Draft::read(attributes, self.state).map(|draft| Drafts::One(draft.map(Box::new)))
            }
            Some(place) => set::drafts(attributes, &place, self.state, &self.name).map(Drafts::Set),
        };
        let drafts = mistakes.take(drafts);
        let persist = mistakes.take(persist(&attributes.persist));
        let drain_timeout = mistakes.take(drain_timeout(attributes));
        let (mut disconnect, mut layout) = (None, None);
        // A set has checked them with its other defaults.
        if !self.is_set() || drafts.is_some() {
            let word_of = &attributes.disconnect;
            disconnect = mistakes.take(word("disconnect", word_of, Disconnect::WORDS));
            layout = mistakes.take(word("layout", &attributes.layout, Layout::WORDS));
        }
        let mut drafts = mistakes.or(drafts)?;
        let disconnect = disconnect.unwrap_or_default();
        let mut warnings = Vec::new();
        if let Drafts::One(Some(draft)) = &mut drafts {
            draft.balancer.layout = layout.unwrap_or_default();
            draft.balancer.disconnect = disconnect;
            self.name.as_str().clone_into(&mut draft.balancer.chain);
            let place = given("backends", &attributes.backends);
            warnings.extend(place.map(|place| ambiguous_ports(&draft.listed, &place)));
        }
        Ok(Checked {
            request: Request {
                name: self.name.clone(),
                variant: self.variant,
                wait: self.wait,
                desired: Desired::Absent,
                persist: persist.unwrap_or_default(),
                disconnect,
                drain_timeout: drain_timeout.unwrap_or_default(),
                warnings: warnings.concat(),
            },
            state: self.state,
            drafts,
        })
    }
}

/// Balancers without backends.
enum Drafts {
    /// One balancer, if there is to be one.
    One(Option<Box<Draft>>),
    /// The balancers of a set.
    Set(Vec<SetDraft>),
}

/// A request without balancers, and the drafts of these.
struct Checked {
    request: Request,
    state: DesiredState,
    drafts: Drafts,
}

impl Checked {
    fn has_names(&self) -> bool {
        match &self.drafts {
            Drafts::One(draft) => draft.as_ref().is_some_and(|draft| draft.has_names()),
            Drafts::Set(drafts) => drafts.iter().any(SetDraft::has_names),
        }
    }

    fn resolve(self, lookup: Lookup) -> Result<Request, BadRequest> {
        let mut request = self.request;
        request.desired = match self.drafts {
            _ if self.state == DesiredState::Absent => Desired::Absent,
            Drafts::One(None) => Desired::Absent,
            Drafts::One(Some(draft)) => {
                let mut arranger = Arranger::default();
                let balancer = draft.resolve(Inherited::default(), lookup, &mut arranger)?;
                Desired::Balancer(balancer.into())
            }
            Drafts::Set(drafts) => {
                let warnings = drafts.iter().flat_map(SetDraft::warnings);
                let mut named: Vec<String> = warnings
                    .map(|(name, warning)| format!("balancer `{name}`: {warning}"))
                    .collect();
                let mut arranger = Arranger::default();
                let drafts = drafts.into_iter();
                let balancers = drafts.map(|draft| draft.resolve(lookup, &mut arranger));
                let balancers = coerce::all(balancers)?;
                named.extend(claims::check(&balancers)?);
                request.warnings = named;
                Desired::Set(balancers)
            }
        };
        check_persist(&request.persist, request.balancers())?;
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
            Desired::Balancer(_) | Desired::Set(_) => DesiredState::Present,
        }
    }

    /// Returns true if nothing is to be there.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        self.desired == Desired::Absent
    }

    /// Returns true if it is about a set of balancers.
    #[must_use]
    pub fn is_set(&self) -> bool {
        matches!(self.desired, Desired::Set(_))
    }

    /// The balancers that are to be there.
    #[must_use]
    pub fn balancers(&self) -> &[Balancer] {
        match &self.desired {
            Desired::Absent => &[],
            Desired::Balancer(balancer) => slice::from_ref(balancer),
            Desired::Set(balancers) => balancers,
        }
    }

    /// Decides which backends are in service under these circumstances, and arranges
    /// them; returns warnings about their shares. Without circumstances every
    /// backend is healthy.
    pub fn decide(&mut self, circumstances: &Circumstances) -> Vec<String> {
        let balancers = match &mut self.desired {
            Desired::Absent => &mut [],
            Desired::Balancer(balancer) => slice::from_mut(&mut **balancer),
            Desired::Set(balancers) => balancers.as_mut_slice(),
        };
        let mut arranger = Arranger::default();
        let nothing = Known::default();
        let mut warnings = Vec::new();
        for balancer in balancers {
            let known = circumstances.0.get(&balancer.name).unwrap_or(&nothing);
            if balancer.decide(known, &mut arranger) {
                let nearly = "the weights of the backends that are in service would need too many rules; \
                              they get nearly these shares";
                warnings.push(balancer.worded(nearly));
            }
        }
        warnings
    }

    /// The pools of all balancers.
    pub fn pools(&self) -> impl Iterator<Item = (&Balancer, &Pool)> {
        let balancers = self.balancers().iter();
        balancers.flat_map(|balancer| balancer.pools.iter().map(move |pool| (balancer, pool)))
    }
}

/// Reads a boolean that a front end has of its own, such as `check`.
///
/// # Errors
/// An error that names it, if the value is no boolean.
pub fn flag(name: &str, value: &Value) -> Result<bool, BadRequest> {
    boolean(&Field::new(name, value))
}

impl RequestAttributes {
    /// The known attributes, the object without those that may be long, and the
    /// mistakes in the names of others.
    fn from_json(mut attributes: json::Object) -> (Self, json::Object, Mistakes) {
        let mut mistakes = Mistakes::default();
        attributes.retain(|_, value| !value.is_null());
        if attributes.contains_key("name") && attributes.remove("chain").is_some() {
            mistakes.add(BadRequest::new(
                "chain",
                "`name` is given too, of which it is another spelling; leave one out",
            ));
        }
        // They may be long, and are not copied.
        let backends = attributes.remove("backends");
        let balancers = attributes.remove("balancers");
        let rest = match Self::deserialize(&attributes) {
            Ok(rest) => rest,
            Err(error) => {
                mistakes.add(misshapen::<Self>(&"".into(), &attributes, &error));
                let known = names_of::<Self>();
                attributes.retain(|name, _| known.contains(name));
                Self::deserialize(&attributes).unwrap_or_default()
            }
        };
        (
            Self {
                backends,
                balancers,
                ..rest
            },
            attributes,
            mistakes,
        )
    }
}

/// An attribute that is there; null counts as left out, as Ansible has it.
fn given<'a>(path: impl Into<Path<'a>>, value: impl Into<Option<&'a Value>>) -> Option<Field<'a>> {
    value
        .into()
        .filter(|value| !value.is_null())
        .map(|value| Field::new(path, value))
}

fn name(attributes: &RequestAttributes) -> Result<Name, BadRequest> {
    let place = given("name", &attributes.name)
        .ok_or_else(|| BadRequest::new("name", "is missing; it names the chain"))?;
    Name::new(&text(&place)?).map_err(|problem| place.refuse(problem))
}

fn drain_timeout(attributes: &RequestAttributes) -> Result<Duration, BadRequest> {
    const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
    let place = given("drain_timeout", &attributes.drain_timeout);
    place.map_or(Ok(Duration::ZERO), |place| {
        seconds(&place, Duration::ZERO..=LONGEST)
    })
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

/// One file serves one family, so each family in use needs its own.
fn check_persist(persist: &Persist, balancers: &[Balancer]) -> Result<(), BadRequest> {
    let pools = || balancers.iter().flat_map(|balancer| &balancer.pools);
    let mut families: Vec<Family> = pools().map(|pool| pool.family).collect();
    families.sort_unstable();
    families.dedup();
    match persist {
        Persist::Path(_) if families.len() > 1 => Err(BadRequest::new(
            "persist",
            "one path serves one family, and both are in use; give {ipv4: path, ipv6: path}",
        )),
        Persist::Paths(paths) => match families.iter().find(|family| !paths.contains_key(family)) {
            Some(family) => Err(BadRequest::new(
                format!("persist.{}", family.as_str()),
                format!("is missing; {} is in use too", family.title()),
            )),
            None => Ok(()),
        },
        Persist::No | Persist::Found | Persist::Path(_) => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::too_many_lines)]
mod tests;
