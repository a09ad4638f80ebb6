//! Values as templates and policies hand them over, into one value of one type.
//!
//! Ansible turns numbers into strings. CFEngine hands over strings only, and
//! prints reals as `70.0000`. Both have many spellings of a boolean and a list.
//! Each function takes the value of a [`Field`] and returns a typed one, or an
//! error with the user's text and the accepted values.

use std::borrow::Cow;
use std::fmt;
use std::iter::Enumerate;
use std::ops::RangeInclusive;
use std::time::Duration;
use std::{slice, vec};

use serde_json::Value;

use super::json;

/// The mistakes in a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRequest {
    first: Mistake,
    more: Vec<Mistake>,
}

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mistake {
    /// The attribute, and the item within it: `backends[2].weight`. Empty for the
    /// request as a whole.
    path: String,
    problem: String,
}

impl BadRequest {
    pub(crate) fn new(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            first: Mistake {
                path: path.into(),
                problem: problem.into(),
            },
            more: Vec::new(),
        }
    }

    /// Adds a way out to the first mistake about a weight that is not whole.
    pub(super) fn with_way_out(mut self, way_out: &str) -> Self {
        let mut mistakes = std::iter::once(&mut self.first).chain(&mut self.more);
        let is_fraction = |mistake: &&mut Mistake| {
            mistake.path.ends_with(".weight") && mistake.problem.ends_with(" is not a whole number")
        };
        if let Some(mistake) = mistakes.find(is_fraction) {
            mistake.problem += "; ";
            mistake.problem += way_out;
        }
        self
    }

    /// The same mistakes in a part of the request: `balancers[3]`.
    pub(super) fn within(mut self, place: &str) -> Self {
        for mistake in std::iter::once(&mut self.first).chain(&mut self.more) {
            mistake.path = match mistake.path.is_empty() {
                true => place.to_owned(),
                false => format!("{place}.{}", mistake.path),
            };
        }
        self
    }

    /// Adds the mistakes of another part of the request.
    fn and(mut self, other: Self) -> Self {
        self.more.push(other.first);
        self.more.extend(other.more);
        self
    }
}

/// Up to five mistakes.
impl fmt::Display for BadRequest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST: usize = 5;
        write!(out, "{}", self.first)?;
        for mistake in self.more.iter().take(MOST - 1) {
            write!(out, "; {mistake}")?;
        }
        match (self.more.len() + 1).saturating_sub(MOST) {
            0 => Ok(()),
            rest => write!(out, "; and {rest} more"),
        }
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.is_empty() {
            true => out.write_str(&self.problem),
            false => write!(out, "{}: {}", self.path, self.problem),
        }
    }
}

impl std::error::Error for BadRequest {}

/// Collects the mistakes of several attributes, so that all are reported at once.
#[derive(Debug, Default)]
pub(super) struct Mistakes(Option<BadRequest>);

impl Mistakes {
    /// The value, or `None` after a mistake.
    pub fn take<T>(&mut self, result: Result<T, BadRequest>) -> Option<T> {
        result.map_err(|bad| self.add(bad)).ok()
    }

    pub fn add(&mut self, bad: BadRequest) {
        self.0 = Some(match self.0.take() {
            Some(earlier) => earlier.and(bad),
            None => bad,
        });
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The value, if there was no mistake.
    ///
    /// # Errors
    /// All mistakes. There is at least one where a value is missing.
    pub fn or<T>(self, value: Option<T>) -> Result<T, BadRequest> {
        match (self.0, value) {
            (Some(bad), _) => Err(bad),
            (None, Some(value)) => Ok(value),
            (None, None) => Err(BadRequest::new("", "the request is not complete")),
        }
    }
}

/// Every item of a list, or the mistakes of all items.
pub(super) fn all<T>(
    items: impl Iterator<Item = Result<T, BadRequest>>,
) -> Result<Vec<T>, BadRequest> {
    let mut mistakes = Mistakes::default();
    let mut found = Vec::with_capacity(items.size_hint().0);
    for item in items {
        found.extend(mistakes.take(item));
    }
    mistakes.or(Some(found))
}

/// The position of a value: an attribute, an item of its list, a key of that
/// item. It becomes text only for an error.
#[derive(Clone, Copy, Debug)]
pub(super) struct Path<'a> {
    attribute: &'a str,
    item: Option<usize>,
    key: Option<&'a str>,
}

impl<'a> From<&'a str> for Path<'a> {
    fn from(attribute: &'a str) -> Self {
        Self {
            attribute,
            item: None,
            key: None,
        }
    }
}

impl<'a> Path<'a> {
    pub fn item(self, at: usize) -> Self {
        Self {
            item: Some(at),
            ..self
        }
    }

    pub fn key(self, name: &'a str) -> Self {
        Self {
            key: Some(name),
            ..self
        }
    }
}

/// `backends[2].weight`
impl fmt::Display for Path<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.attribute)?;
        if let Some(at) = self.item {
            write!(out, "[{at}]")?;
        }
        match self.key {
            Some(key) => write!(out, ".{}", key.escape_debug()),
            None => Ok(()),
        }
    }
}

/// A value and the path at which it stands.
#[derive(Clone, Debug)]
pub(super) struct Field<'a> {
    pub path: Path<'a>,
    pub value: Cow<'a, Value>,
}

impl<'a> Field<'a> {
    pub fn new(path: impl Into<Path<'a>>, value: &'a Value) -> Self {
        Self {
            path: path.into(),
            value: Cow::Borrowed(value),
        }
    }

    pub fn owned(path: Path<'a>, value: impl Into<Value>) -> Self {
        Self {
            path,
            value: Cow::Owned(value.into()),
        }
    }

    /// The error that this value has `problem`.
    pub fn bad(&self, problem: impl Into<String>) -> BadRequest {
        BadRequest::new(self.path.to_string(), problem)
    }

    /// The error that the value, shown in backticks, `is_wrong`.
    pub fn refuse(&self, is_wrong: impl fmt::Display) -> BadRequest {
        self.bad(format!("{} {is_wrong}", shown(&self.value)))
    }
}

/// The user's own text in backticks: on one line, without control characters
/// and not longer than a line.
fn shown(value: &Value) -> String {
    const MOST: usize = 60;
    let text = match value {
        Value::String(text) => text
            .escape_debug()
            .to_string()
            .replace("\\\"", "\"")
            .replace("\\'", "'"),
        // JSON leaves DEL and the controls from U+0080 on as they are.
        other => printable(&other.to_string()),
    };
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("`{}...`", &text[..end]),
        None => format!("`{text}`"),
    }
}

fn printable(text: &str) -> String {
    let printable = |letter: char| match letter.is_control() {
        true => letter.escape_debug().collect(),
        false => String::from(letter),
    };
    text.chars().map(printable).collect()
}

/// A scalar as text, without blanks around it.
pub(super) fn text<'a>(place: &'a Field) -> Result<Cow<'a, str>, BadRequest> {
    let text: Cow<str> = match &*place.value {
        Value::String(text) => text.trim_matches([' ', '\t']).into(),
        Value::Number(number) => number.to_string().into(),
        _ => return Err(place.refuse("is not a string")),
    };
    if text.is_empty() {
        return Err(place.bad("is empty; leave the attribute out instead"));
    }
    if text.chars().any(char::is_control) {
        return Err(place.refuse("has a control character in it"));
    }
    Ok(text)
}

/// A whole number within `range`; `"3"`, `" 3 "`, `3.0` and `"3.0000"` are 3.
pub(super) fn integer(place: &Field, range: RangeInclusive<u32>) -> Result<u32, BadRequest> {
    let number = match &*place.value {
        Value::Number(number) => integer_in(&number.to_string(), range),
        Value::String(text) => integer_in(text, range),
        _ => Err("is not a whole number".to_owned()),
    };
    number.map_err(|problem| place.refuse(problem))
}

/// The same for a part of a text.
pub(super) fn integer_in(text: &str, range: RangeInclusive<u32>) -> Result<u32, String> {
    let number = whole(text.trim()).ok_or("is not a whole number")?;
    let number = u32::try_from(number).ok();
    number
        .filter(|number| range.contains(number))
        .ok_or_else(|| format!("is not between {} and {}", range.start(), range.end()))
}

/// The value of decimal digits with an optional sign and a fraction of zeros. A
/// value out of the range of `i64` becomes its nearest end.
fn whole(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text),
    };
    let (digits, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(digits) || !is_number(fraction) || fraction.bytes().any(|byte| byte != b'0') {
        return None;
    }
    Some(sign * digits.parse::<i64>().unwrap_or(i64::MAX))
}

/// A time in seconds within `range`, with up to three decimals: `2`, `"0.25"`.
pub(super) fn seconds(
    place: &Field,
    range: RangeInclusive<Duration>,
) -> Result<Duration, BadRequest> {
    let text = match &*place.value {
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.trim().to_owned(),
        _ => String::new(),
    };
    let time = milliseconds(&text).map(Duration::from_millis);
    let time = time.ok_or_else(|| place.refuse("is no time in seconds, such as 2 or 0.25"))?;
    match range.contains(&time) {
        true => Ok(time),
        false => Err(place.refuse(format_args!(
            "is not between {} and {} seconds",
            range.start().as_secs_f64(),
            range.end().as_secs_f64()
        ))),
    }
}

/// The value of decimal digits with an optional fraction, in thousandths. Digits after
/// the third decimal are zeros.
fn milliseconds(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let fraction = match fraction.trim_end_matches('0') {
        _ if !is_number(fraction) => return None,
        significant if significant.len() > 3 => return None,
        significant => format!("{significant:0<3}"),
    };
    let whole: u64 = Some(whole).filter(|part| is_number(part))?.parse().ok()?;
    whole.checked_mul(1000)?.checked_add(fraction.parse().ok()?)
}

/// An object, or its JSON text.
pub(super) fn object<'a>(
    place: &'a Field,
    example: &str,
) -> Result<Cow<'a, json::Object>, BadRequest> {
    match &*place.value {
        Value::Object(object) => Ok(Cow::Borrowed(object)),
        Value::String(text) => match from_json_text(place, text)? {
            Some(Value::Object(object)) => Ok(Cow::Owned(object)),
            _ => Err(place.refuse(format_args!("is no mapping such as {example}"))),
        },
        _ => Err(place.refuse(format_args!("is no mapping such as {example}"))),
    }
}

/// A boolean in any spelling that Ansible knows.
pub(super) fn boolean(place: &Field) -> Result<bool, BadRequest> {
    as_boolean(&place.value)
        .ok_or_else(|| place.refuse("is neither true nor false (yes, no, on, off, 1, 0)"))
}

/// The boolean that a value spells, if it does.
pub(super) fn as_boolean(value: &Value) -> Option<bool> {
    let text = match value {
        Value::Bool(flag) => return Some(*flag),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.trim().to_lowercase(),
        _ => return None,
    };
    match text.as_str() {
        "yes" | "y" | "true" | "t" | "on" | "1" | "1.0" => Some(true),
        "no" | "n" | "false" | "f" | "off" | "0" | "0.0" => Some(false),
        _ => None,
    }
}

/// One of a fixed set of words.
pub(super) fn choice<T: Copy>(place: &Field, choices: &[(&str, T)]) -> Result<T, BadRequest> {
    let word = place.value.as_str().unwrap_or_default().trim();
    let found = choices.iter().find(|(name, _)| *name == word);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        place.refuse(format_args!("is not one of: {}", names.join(", ")))
    })
}

/// The items of a list, in any of its forms: a list, a comma-separated string,
/// a JSON text, an object `{"0": .., "1": ..}`, or a single scalar.
pub(super) fn list<'a>(place: &'a Field<'a>) -> Result<Items<'a>, BadRequest> {
    match &*place.value {
        Value::String(text) => match from_json_text(place, text)? {
            Some(inner) => list_of(place, Cow::Owned(inner)),
            None => comma_separated(place, text),
        },
        value => list_of(place, Cow::Borrowed(value)),
    }
}

/// The items of a list, each at its place.
#[derive(Debug)]
pub(super) enum Items<'a> {
    /// As they arrived: there may be very many.
    Given(Path<'a>, Enumerate<slice::Iter<'a, Value>>),
    /// Read out of something else.
    Made(vec::IntoIter<Field<'a>>),
}

impl<'a> Iterator for Items<'a> {
    type Item = Field<'a>;

    fn next(&mut self) -> Option<Field<'a>> {
        match self {
            Self::Given(path, items) => {
                let (at, item) = items.next()?;
                Some(Field::new(path.item(at), item))
            }
            Self::Made(places) => places.next(),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        match self {
            Self::Given(_, items) => items.size_hint(),
            Self::Made(places) => places.size_hint(),
        }
    }
}

impl ExactSizeIterator for Items<'_> {}

fn list_of<'a>(place: &Field<'a>, value: Cow<'a, Value>) -> Result<Items<'a>, BadRequest> {
    match value {
        Cow::Borrowed(Value::Array(items)) => {
            Ok(Items::Given(place.path, items.iter().enumerate()))
        }
        Cow::Owned(Value::Array(items)) => Ok(numbered(place.path, items)),
        Cow::Borrowed(Value::Object(entries)) => numbered_object(place, entries.clone()),
        Cow::Owned(Value::Object(entries)) => numbered_object(place, entries),
        Cow::Borrowed(Value::Null) | Cow::Owned(Value::Null) => Err(place.refuse("is not a list")),
        scalar => Ok(numbered(place.path, [scalar.into_owned()])),
    }
}

fn numbered(path: Path<'_>, items: impl IntoIterator<Item = Value>) -> Items<'_> {
    let items = items.into_iter().enumerate();
    let places: Vec<_> = items
        .map(|(at, item)| Field::owned(path.item(at), item))
        .collect();
    Items::Made(places.into_iter())
}

/// CFEngine's arrays: the keys are the places, in any order.
fn numbered_object<'a>(place: &Field<'a>, entries: json::Object) -> Result<Items<'a>, BadRequest> {
    let mut items = Vec::with_capacity(entries.len());
    for (key, item) in entries {
        let at: u32 = key.parse().map_err(|_| {
            place.bad(format!(
                "is an object with the key `{}`; a list was expected",
                key.escape_debug()
            ))
        })?;
        items.push((at, item));
    }
    items.sort_by_key(|(at, _)| *at);
    if let Some(pair) = items.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(place.bad(format!("has two items with the number {}", pair[0].0)));
    }
    let items = items.into_iter();
    let places: Vec<_> = items
        .map(|(at, item)| Field::owned(place.path.item(at as usize), item))
        .collect();
    Ok(Items::Made(places.into_iter()))
}

/// The value of a string that is a JSON list or object. `[fd00::1]:80` is
/// neither. A string that begins like a list of strings or objects and is not
/// JSON is an error, which is clearer than a split at its commas.
fn from_json_text(place: &Field, text: &str) -> Result<Option<Value>, BadRequest> {
    let trimmed = text.trim();
    if !trimmed.starts_with(['[', '{']) {
        return Ok(None);
    }
    let meant = |inner: &str| inner.trim_start().starts_with(['"', '{', ']', '}']);
    match json::parse(trimmed.as_bytes()) {
        Ok(value) => Ok(Some(value)),
        Err(error) if meant(&trimmed[1..]) => {
            Err(place.refuse(format_args!("is not JSON: {error}")))
        }
        Err(_) => Ok(None),
    }
}

fn comma_separated<'a>(place: &Field<'a>, text: &str) -> Result<Items<'a>, BadRequest> {
    if text.trim().is_empty() {
        return Ok(numbered(place.path, []));
    }
    let items = text.split(',').map(str::trim);
    match items.clone().position(str::is_empty) {
        Some(at) => Err(BadRequest::new(place.path.item(at).to_string(), "is empty")),
        None => Ok(numbered(place.path, items.map(Value::from))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn at(value: Value) -> Field<'static> {
        Field::owned("it".into(), value)
    }

    fn message<T: fmt::Debug>(result: Result<T, BadRequest>) -> String {
        result.unwrap_err().to_string()
    }

    /// A value in an error message cannot steer a terminal.
    #[test]
    fn control_characters_are_shown_as_text() {
        let odd = "a\u{7f}\u{9b}31m\n";
        let shown = "a\\u{7f}\\u{9b}31m\\n";
        assert_eq!(
            message(integer(&at(json!(odd)), 0..=9)),
            format!("it: `{shown}` is not a whole number")
        );
        assert_eq!(
            message(text(&at(json!([odd])))),
            format!("it: `[\"{shown}\"]` is not a string")
        );
    }

    #[test]
    fn numbers_come_in_many_spellings() {
        for value in [
            json!(7),
            json!(7.0),
            json!("7"),
            json!(" 7 "),
            json!("7.0000"),
            json!("07"),
        ] {
            assert_eq!(integer(&at(value), 0..=9), Ok(7));
        }
        for value in [
            json!(7.5),
            json!("7x"),
            json!("1e3"),
            json!(""),
            json!("+7"),
            json!("7."),
            json!(true),
            json!([7]),
            json!("0x7"),
            json!("٧"),
        ] {
            assert!(message(integer(&at(value), 0..=9)).ends_with("is not a whole number"));
        }
        assert_eq!(
            message(integer(&at(json!(-1)), 0..=9)),
            "it: `-1` is not between 0 and 9"
        );
        assert_eq!(
            message(integer(&at(json!("99999999999999999999")), 0..=9)),
            "it: `99999999999999999999` is not between 0 and 9"
        );
        assert!(message(integer(&at(json!(1e30)), 0..=9)).contains("1e+30"));
    }

    #[test]
    fn booleans_come_in_every_spelling_that_ansible_knows() {
        for value in [
            json!(true),
            json!("Yes"),
            json!("on"),
            json!("1"),
            json!(1),
            json!("TRUE"),
            json!("t"),
            json!("y"),
        ] {
            assert_eq!(boolean(&at(value)), Ok(true));
        }
        for value in [
            json!(false),
            json!("No"),
            json!("off"),
            json!("0"),
            json!(0),
            json!("False"),
            json!("f"),
            json!("n"),
        ] {
            assert_eq!(boolean(&at(value)), Ok(false));
        }
        assert!(
            message(boolean(&at(json!("maybe"))))
                .starts_with("it: `maybe` is neither true nor false")
        );
    }

    #[test]
    fn all_forms_of_a_list_are_the_same_list() {
        let expected = [
            ("it[0]".to_owned(), json!("a")),
            ("it[1]".to_owned(), json!("b")),
        ];
        for value in [
            json!(["a", "b"]),
            json!("a,b"),
            json!(" a , b "),
            json!("[\"a\", \"b\"]"),
            json!({"1": "b", "0": "a"}),
            json!("{\"0\": \"a\", \"1\": \"b\"}"),
        ] {
            let place = at(value);
            let items = list(&place).unwrap();
            let seen: Vec<_> = items
                .map(|item| (item.path.to_string(), item.value.into_owned()))
                .collect();
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn an_object_is_ordered_by_number_and_not_by_text() {
        let object: json::Object = (0..12).map(|n| (n.to_string(), json!(n))).collect();
        let place = at(Value::Object(object));
        let items = list(&place).unwrap();
        let values: Vec<_> = items.map(|item| item.value.into_owned()).collect();
        assert_eq!(values, (0..12).map(|n| json!(n)).collect::<Vec<_>>());
    }

    #[test]
    fn an_ipv6_address_in_brackets_is_not_json() {
        let place = at(json!("[fd00::1]:80,[1::2]:80"));
        let mut items = list(&place).unwrap();
        assert_eq!(*items.nth(1).unwrap().value, json!("[1::2]:80"));
    }

    #[test]
    fn a_malformed_list_is_an_error() {
        assert!(message(list(&at(json!("[{\"a\": 1}")))).contains("is not JSON"));
        assert!(message(list(&at(json!({"a": 1})))).contains("the key `a`"));
        assert_eq!(message(list(&at(json!("a,,b")))), "it[1]: is empty");
        assert_eq!(
            message(list(&at(json!({"0": 1, "00": 2})))),
            "it: has two items with the number 0"
        );
    }

    #[test]
    fn values_in_errors_are_short_and_on_one_line() {
        assert_eq!(shown(&json!("a\n\"b\"\u{1b}")), "`a\\n\"b\"\\u{1b}`");
        assert_eq!(shown(&json!("x".repeat(100))).len(), 65);
        assert_eq!(
            message(text(&at(json!("a\0b")))),
            "it: `a\\0b` has a control character in it"
        );
    }
}
