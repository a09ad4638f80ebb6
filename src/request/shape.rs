//! The names of attributes: unknown ones lead to the known one that is meant.

use serde::Deserialize;
use serde_json::Value;

use super::coerce::{BadRequest, Path, all};
use super::json;

/// An object into its shape: every key is known, the values are unchecked.
pub(super) fn shaped<T>(path: &Path, object: &json::Object) -> Result<T, BadRequest>
where
    T: for<'de> Deserialize<'de> + schemars::JsonSchema,
{
    T::deserialize(object).map_err(|error| misshapen::<T>(path, object, &error))
}

/// The only possible mistake in a shape is an unknown key. All are named.
pub(super) fn misshapen<T: schemars::JsonSchema>(
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
pub(super) fn names_of<T: schemars::JsonSchema>() -> Vec<String> {
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
