//! Sets: several balancers in one request, with defaults for all of them.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::backend::ambiguous_ports;
use super::balancer::{Balancer, Draft, Inherited};
use super::coerce::{BadRequest, Field, Mistakes, as_boolean, list, text};
use super::hash;
use super::pool::Arranger;
use super::shape::{misshapen, names_of};
use super::unchecked::{BalancerAttributes, RequestAttributes};
use super::{DesiredState, Disconnect, Layout, Lookup, Name, given, json, word};

/// The attributes that belong to the whole set.
const OF_THE_SET: [&str; 7] = [
    "state",
    "variant",
    "wait",
    "persist",
    "ip_forward",
    "jump",
    "drain_timeout",
];

/// A balancer of a set before its names are looked up.
pub(super) struct SetDraft {
    /// Its place in the request: `balancers[3]`.
    place: String,
    draft: Draft,
    inherited: Inherited,
    warnings: Vec<String>,
}

/// Reads the balancers of a set. None in the state `absent`, where they are
/// checked all the same.
pub(super) fn drafts(
    defaults: &RequestAttributes,
    place: &Field,
    state: DesiredState,
    name: &Name,
) -> Result<Vec<SetDraft>, BadRequest> {
    let mut mistakes = Mistakes::default();
    for (attribute, value) in [
        ("destination_port", &defaults.destination_port),
        ("backends", &defaults.backends),
    ] {
        if given(attribute, value).is_some() {
            mistakes.add(BadRequest::new(
                attribute,
                "stands beside `balancers`; give it to each balancer instead",
            ));
        }
    }
    check_defaults(defaults, &mut mistakes);
    let are_defaults_right = mistakes.is_empty();
    let mut drafts = Vec::new();
    let mut places = HashMap::new();
    for item in list(place)? {
        let at = item.path.to_string();
        let within = |bad: BadRequest| bad.within(&at);
        let read = read(&item, defaults, state, name, are_defaults_right).map_err(within);
        let Some((label, draft)) = mistakes.take(read) else {
            continue;
        };
        if let Some(earlier) = places.insert(label.clone(), at.clone()) {
            let problem = format!("`{label}` is the name of {earlier} too");
            mistakes.add(BadRequest::new(format!("{at}.name"), problem));
        }
        drafts.extend(draft.map(|draft| SetDraft { place: at, ..draft }));
    }
    mistakes.or(Some(drafts))
}

/// The values of defaults must be right, also where every balancer has its own.
/// They need not fit together: a balancer may have the part that is missing.
fn check_defaults(defaults: &RequestAttributes, mistakes: &mut Mistakes) {
    let is_no = defaults.masquerade.as_ref().is_none_or(is_no);
    let is_open = defaults.out_interface.is_none();
    let masquerade = match &defaults.masquerade {
        Some(value) if value == "all" && is_open => Some(Value::from("balanced")),
        _ if is_no && !(is_open && defaults.snat_address.is_none()) => Some("balanced".into()),
        other => other.clone(),
    };
    // The list of balancers may be long, so the defaults are not cloned whole.
    let own = BalancerAttributes {
        masquerade,
        snat_address: defaults.snat_address.clone(),
        out_interface: defaults.out_interface.clone(),
        ..BalancerAttributes::default()
    };
    let alone = RequestAttributes {
        hash_key: None,
        hash_prefix: None,
        hash_seed: None,
        ..with_defaults(own, defaults).0
    };
    mistakes.take(Draft::read(&alone, DesiredState::Absent));
    mistakes.take(hash::values(defaults));
    mistakes.take(word("disconnect", &alone.disconnect, Disconnect::WORDS));
    mistakes.take(word("layout", &alone.layout, Layout::WORDS));
}

fn is_no(masquerade: &Value) -> bool {
    masquerade.as_str().is_some_and(|word| word.trim() == "no")
        || as_boolean(masquerade) == Some(false)
}

/// One item of the list: its name, and the balancer where there is to be one.
fn read(
    item: &Field,
    defaults: &RequestAttributes,
    state: DesiredState,
    set: &Name,
    are_defaults_right: bool,
) -> Result<(String, Option<SetDraft>), BadRequest> {
    let mut mistakes = Mistakes::default();
    let attributes = shaped(item, &mut mistakes)?;
    let label = mistakes.take(label(&attributes, set));
    let (attributes, inherited) = match are_defaults_right {
        true => with_defaults(attributes, defaults),
        false => with_defaults(attributes, &RequestAttributes::default()),
    };
    let state = match are_defaults_right {
        true => state,
        false => DesiredState::Absent,
    };
    let draft = mistakes.take(Draft::read(&attributes, state));
    let disconnect = word("disconnect", &attributes.disconnect, Disconnect::WORDS);
    let disconnect = mistakes.take(disconnect).unwrap_or_default();
    let layout = mistakes.take(word("layout", &attributes.layout, Layout::WORDS));
    let (label, draft) = mistakes.or(label.zip(draft))?;
    let Some(mut draft) = draft else {
        return Ok((label, None));
    };
    draft.balancer.layout = layout.unwrap_or_default();
    draft.balancer.disconnect = disconnect;
    draft.balancer.chain = format!("{}/{label}", set.as_str());
    draft.balancer.name = Some(label.clone());
    let backends = given("backends", &attributes.backends);
    let warnings = backends.map(|place| ambiguous_ports(&draft.listed, &place));
    let draft = SetDraft {
        place: String::new(),
        draft,
        inherited,
        warnings: warnings.unwrap_or_default(),
    };
    Ok((label, Some(draft)))
}

/// The attributes of an item, which is an object or its JSON text.
fn shaped(item: &Field, mistakes: &mut Mistakes) -> Result<BalancerAttributes, BadRequest> {
    if let Some(attributes) = item.value.as_object().and_then(known) {
        return Ok(attributes);
    }
    let parsed = match &*item.value {
        Value::String(text) if text.trim_start().starts_with('{') => {
            json::parse(text.trim().as_bytes())
                .map_err(|error| BadRequest::new("", format!("is not JSON: {error}")))?
        }
        value => value.clone(),
    };
    let Value::Object(mut object) = parsed else {
        let problem = "is not an object {name, destination_port, backends, ...}";
        return Err(BadRequest::new("", problem));
    };
    object.retain(|_, value| !value.is_null());
    for attribute in OF_THE_SET {
        if object.remove(attribute).is_some() {
            let problem = "belongs to the whole set; give it beside `balancers`";
            mistakes.add(BadRequest::new(attribute, problem));
        }
    }
    match BalancerAttributes::deserialize(&object) {
        Ok(attributes) => Ok(attributes),
        Err(error) => {
            mistakes.add(misshapen::<BalancerAttributes>(&"".into(), &object, &error));
            let known = names_of::<BalancerAttributes>();
            object.retain(|name, _| known.contains(name));
            Ok(BalancerAttributes::deserialize(&object).unwrap_or_default())
        }
    }
}

/// The attributes of an item of which every name is known. There may be thousands of
/// items, whose values are copied once here; serde would copy them twice
/// (`benches/sets.py`).
fn known(object: &json::Object) -> Option<BalancerAttributes> {
    let mut found = BalancerAttributes::default();
    for (name, value) in object.iter().filter(|(_, value)| !value.is_null()) {
        let place = match name.as_str() {
            "name" => &mut found.name,
            "mode" => &mut found.mode,
            "hash_key" => &mut found.hash_key,
            "hash_prefix" => &mut found.hash_prefix,
            "hash_seed" => &mut found.hash_seed,
            "backends" => &mut found.backends,
            "protocol" => &mut found.protocol,
            "destination_port" => &mut found.destination_port,
            "destination" => &mut found.destination,
            "source" => &mut found.source,
            "in_interface" => &mut found.in_interface,
            "layout" => &mut found.layout,
            "local_traffic" => &mut found.local_traffic,
            "masquerade" => &mut found.masquerade,
            "snat_address" => &mut found.snat_address,
            "out_interface" => &mut found.out_interface,
            "forward" => &mut found.forward,
            "when_empty" => &mut found.when_empty,
            "disconnect" => &mut found.disconnect,
            "health" => &mut found.health,
            _ => return None,
        };
        *place = Some(value.clone());
    }
    Some(found)
}

/// The name of a balancer. With that of the set it is the name of a chain.
fn label(attributes: &BalancerAttributes, set: &Name) -> Result<String, BadRequest> {
    let problem = "is missing; each balancer of a set has a name";
    let place = given("name", &attributes.name).ok_or_else(|| BadRequest::new("name", problem))?;
    let text = text(&place)?;
    match set.check_member(&text) {
        Ok(()) => Ok(text.into_owned()),
        Err(problem) => Err(place.refuse(problem)),
    }
}

/// The attributes of a balancer, with the defaults of the set. Those about the
/// rewriting of source addresses, and those about a hash, are for the balancers that
/// do it.
fn with_defaults(
    own: BalancerAttributes,
    defaults: &RequestAttributes,
) -> (RequestAttributes, Inherited) {
    let or = |own: Option<Value>, default: &Option<Value>| own.or_else(|| default.clone());
    let masquerade = or(own.masquerade, &defaults.masquerade);
    let nothing = RequestAttributes::default();
    let of_masquerade = match masquerade.as_ref().is_none_or(is_no) {
        true => &nothing,
        false => defaults,
    };
    let mode = or(own.mode, &defaults.mode);
    let is_hash = |mode: &Value| mode.as_str().is_some_and(|word| word.trim() == "hash");
    let of_hash = match mode.as_ref().is_some_and(is_hash) {
        true => defaults,
        false => &nothing,
    };
    let inherited = Inherited {
        destination: own.destination.is_none(),
        source: own.source.is_none(),
        snat_address: own.snat_address.is_none(),
    };
    let attributes = RequestAttributes {
        backends: own.backends,
        destination_port: own.destination_port,
        mode,
        hash_key: or(own.hash_key, &of_hash.hash_key),
        hash_prefix: or(own.hash_prefix, &of_hash.hash_prefix),
        hash_seed: or(own.hash_seed, &of_hash.hash_seed),
        protocol: or(own.protocol, &defaults.protocol),
        destination: or(own.destination, &defaults.destination),
        source: or(own.source, &defaults.source),
        in_interface: or(own.in_interface, &defaults.in_interface),
        layout: or(own.layout, &defaults.layout),
        local_traffic: or(own.local_traffic, &defaults.local_traffic),
        snat_address: or(own.snat_address, &of_masquerade.snat_address),
        out_interface: or(own.out_interface, &of_masquerade.out_interface),
        masquerade,
        forward: or(own.forward, &defaults.forward),
        when_empty: or(own.when_empty, &defaults.when_empty),
        disconnect: or(own.disconnect, &defaults.disconnect),
        health: or(own.health, &defaults.health),
        jump: defaults.jump.clone(),
        ip_forward: defaults.ip_forward.clone(),
        ..RequestAttributes::default()
    };
    (attributes, inherited)
}

impl SetDraft {
    /// Returns true if a backend is a name that must be looked up.
    pub fn has_names(&self) -> bool {
        self.draft.has_names()
    }

    /// The balancer, with addresses in the place of names.
    pub fn resolve(self, lookup: Lookup, arranger: &mut Arranger) -> Result<Balancer, BadRequest> {
        let resolved = self.draft.resolve(self.inherited, lookup, arranger);
        resolved.map_err(|bad| bad.within(&self.place))
    }

    /// Warnings about values that may be meant otherwise, with the balancer's name.
    pub fn warnings(&self) -> impl Iterator<Item = (String, String)> {
        let name = self.draft.balancer.name.as_deref().unwrap_or_default();
        let warnings = self.warnings.iter();
        warnings.map(move |warning| (name.to_owned(), warning.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attribute_of_a_balancer_is_copied() {
        let names = names_of::<BalancerAttributes>();
        for name in &names {
            let mut object = json::Object::new();
            object.insert(name.clone(), 7.into());
            let shape = serde_json::to_value(&object).unwrap();
            let copied = known(&object).unwrap_or_else(|| panic!("{name}"));
            let read = BalancerAttributes::deserialize(shape).unwrap();
            assert_eq!(format!("{copied:?}"), format!("{read:?}"));
        }
        assert_eq!(names.len(), 20);
    }
}
