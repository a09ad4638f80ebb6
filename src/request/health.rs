//! Health checks: the attribute `health`.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::backend::BackendEntry;
use super::coerce::{
    BadRequest, Field, Mistakes, choice, integer, integer_in, list, object, seconds, text,
};
use super::unchecked::{CheckType, HealthAttributes, RequestAttributes};
use super::{given, shaped};

/// The checks of a balancer's backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// The kind of probe.
    pub check: Check,
    /// The port that is probed; without one that of the backend.
    pub port: Option<u16>,
    /// The time from the beginning of one check to the next.
    pub interval: Duration,
    /// The time limit of one check.
    pub timeout: Duration,
    /// The good checks in a row that bring a backend up.
    pub rise: u32,
    /// The failed checks in a row that take a backend down.
    pub fall: u32,
    /// The point at which health is ignored.
    pub panic_threshold: PanicThreshold,
}

/// The kind of probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// The connection is accepted.
    Tcp,
    /// GET is answered with an expected status.
    Http {
        /// The path that is asked for.
        path: String,
        /// The header `Host`; without one the address that is probed.
        host: Option<String>,
        /// The expected status codes.
        status: Vec<RangeInclusive<u16>>,
    },
}

/// The point at which health is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanicThreshold {
    /// None: an unhealthy pool is an empty one.
    Never,
    /// When no more than this many per cent of the weight are healthy.
    PerCent(u32),
}

impl Default for Health {
    fn default() -> Self {
        Self {
            check: Check::Tcp,
            port: None,
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise: 2,
            fall: 3,
            panic_threshold: PanicThreshold::PerCent(0),
        }
    }
}

/// Reads the attribute `health`.
pub(super) fn health(attributes: &RequestAttributes) -> Result<Option<Health>, BadRequest> {
    let Some(place) = given("health", &attributes.health) else {
        return Ok(None);
    };
    let example = "{type: tcp, interval: 2, timeout: 1, rise: 2, fall: 3}";
    let found = object(&place, example)?;
    let attributes: HealthAttributes = shaped(&place.path, &found)?;
    read(&place, &attributes).map(Some)
}

fn read(place: &Field, attributes: &HealthAttributes) -> Result<Health, BadRequest> {
    let mut mistakes = Mistakes::default();
    let default = Health::default();
    let key = |name, value| given(place.path.key(name), value);
    let count = |field: Field| integer(&field, 1..=1000);
    let time = |field: Field, least| seconds(&field, least..=Duration::from_secs(3600));
    let check = mistakes.take(check(place, attributes));
    let port = key("port", &attributes.port).map(|field| integer(&field, 1..=65_535));
    let port = mistakes.take(port.transpose());
    let interval = key("interval", &attributes.interval);
    let interval = interval.map(|field| time(field, Duration::from_millis(50)));
    let interval = mistakes.take(interval.unwrap_or(Ok(default.interval)));
    let timeout = key("timeout", &attributes.timeout);
    let timeout = timeout.map(|field| time(field, Duration::from_millis(10)));
    let timeout = mistakes.take(timeout.unwrap_or(Ok(default.timeout)));
    let rise = key("rise", &attributes.rise).map_or(Ok(default.rise), count);
    let rise = mistakes.take(rise);
    let fall = key("fall", &attributes.fall).map_or(Ok(default.fall), count);
    let fall = mistakes.take(fall);
    let threshold = key("panic_threshold", &attributes.panic_threshold);
    let threshold = threshold.map_or(Ok(default.panic_threshold), |field| threshold_of(&field));
    let panic_threshold = mistakes.take(threshold).unwrap_or(default.panic_threshold);
    mistakes.or(check.zip(port).map(|(check, port)| Health {
        check,
        port: port.and_then(|port| u16::try_from(port).ok()),
        interval: interval.unwrap_or(default.interval),
        timeout: timeout.unwrap_or(default.timeout),
        rise: rise.unwrap_or(default.rise),
        fall: fall.unwrap_or(default.fall),
        panic_threshold,
    }))
}

fn check(place: &Field, attributes: &HealthAttributes) -> Result<Check, BadRequest> {
    let key = |name, value| given(place.path.key(name), value);
    let kind = key("type", &attributes.r#type);
    let kind = kind.map_or(Ok(CheckType::default()), |field| {
        choice(&field, CheckType::WORDS)
    })?;
    let path = key("path", &attributes.path);
    let host = key("host", &attributes.host);
    let status = key("status", &attributes.status);
    let mut mistakes = Mistakes::default();
    if kind == CheckType::Tcp {
        for field in [&path, &host, &status].into_iter().flatten() {
            mistakes.add(field.bad("belongs to `type: http`; say so, or leave it out"));
        }
        return mistakes.or(Some(Check::Tcp));
    }
    let path = path.map_or(Ok("/".to_owned()), |field| path_of(&field));
    let path = mistakes.take(path);
    let host = mistakes.take(host.map(|field| host_of(&field)).transpose());
    let status = status.map_or(Ok(vec![200..=399]), |field| status_of(&field));
    let status = mistakes.take(status);
    let parts = path.zip(host).zip(status);
    mistakes.or(parts.map(|((path, host), status)| Check::Http { path, host, status }))
}

/// A path as it stands in the request line.
fn path_of(field: &Field) -> Result<String, BadRequest> {
    let path = text(field)?;
    if !path.starts_with('/') {
        return Err(field.refuse("is no path; it begins with `/`, and the host is `host`"));
    }
    match path.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok(path.into_owned()),
        false => Err(field.refuse("has characters that a path cannot have; write them as %XX")),
    }
}

fn host_of(field: &Field) -> Result<String, BadRequest> {
    let host = text(field)?;
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
    match host.len() <= 255 && host.bytes().all(is_allowed) {
        true => Ok(host.into_owned()),
        false => Err(field.refuse("is not HOST or HOST:PORT, as the header `Host` has it")),
    }
}

/// A code, a range, or a list of these.
fn status_of(field: &Field) -> Result<Vec<RangeInclusive<u16>>, BadRequest> {
    let codes = |item: Field| {
        let item = Field {
            path: field.path,
            ..item
        };
        let word = text(&item)?;
        let (first, last) = word.split_once('-').unwrap_or((&word, &word));
        let code = |part: &str| {
            let code = integer_in(part, 100..=599).map_err(|problem| {
                let way_out = "a status is a code such as 200, a range such as 200-399, or a list";
                item.refuse(format_args!("{problem}; {way_out}"))
            })?;
            Ok(u16::try_from(code).unwrap_or(u16::MAX))
        };
        let (first, last) = (code(first)?, code(last)?);
        match first <= last {
            true => Ok(first..=last),
            false => Err(item.refuse("is a range that begins after its end")),
        }
    };
    let ranges: Vec<_> = list(field)?.map(codes).collect::<Result<_, _>>()?;
    match ranges.is_empty() {
        true => Err(field.bad("is empty; leave the attribute out instead")),
        false => Ok(ranges),
    }
}

fn threshold_of(field: &Field) -> Result<PanicThreshold, BadRequest> {
    let word = field.value.as_str().unwrap_or_default().trim();
    if word == "never" {
        return Ok(PanicThreshold::Never);
    }
    let number = integer(field, 0..=100).map(PanicThreshold::PerCent);
    number.map_err(|_| field.refuse("is neither `never` nor a whole number of per cent, 0 to 100"))
}

/// Checks that every backend has a port that can be probed.
pub(super) fn check_ports(health: &Health, listed: &[BackendEntry]) -> Result<(), BadRequest> {
    let portless = listed.iter().position(|entry| entry.port.is_none());
    match (health.port, portless) {
        (None, Some(at)) => {
            let problem = format!("is missing; backends[{at}] has no port that could be probed");
            Err(BadRequest::new("health.port", problem))
        }
        _ => Ok(()),
    }
}
