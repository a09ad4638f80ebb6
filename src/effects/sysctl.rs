//! Forwarding: the sysctls, and the file that sets them at boot.

use std::path::Path;

use crate::host::{Host, forwarding_sysctl};
use crate::netfilter::Family;
use crate::plan::Plan;
use crate::request::{Persist, Request};

/// The file that keeps forwarding on after a reboot. Its name sorts after all
/// that begin with a number, so it is read after them.
pub const FILE: &str = "/etc/sysctl.d/zz-iptables_balance.conf";

/// The mode of a new [`FILE`]: every user can read the same in `/proc`.
pub const MODE: u32 = 0o644;

/// Returns true if forwarding is to be on after a reboot too.
#[must_use]
pub fn is_persistent(request: &Request) -> bool {
    is_requested(request) && request.persist != Persist::No
}

/// Returns true for [`FILE`].
#[must_use]
pub fn is_file(path: &Path) -> bool {
    path == Path::new(FILE)
}

/// The families that are to be forwarded.
pub fn requested(request: &Request, plan: &Plan) -> impl Iterator<Item = Family> {
    let wanted = |family: &Family| is_requested(request) && plan.uses(*family);
    Family::BOTH.into_iter().filter(wanted)
}

/// The families that are forwarded or not, as far as that can be read.
#[must_use]
pub fn observe(host: &impl Host) -> std::collections::BTreeMap<Family, bool> {
    let known = |family| Some((family, host.forwarding(family)?));
    Family::BOTH.into_iter().filter_map(known).collect()
}

fn is_requested(request: &Request) -> bool {
    let mut balancers = request.balancers().iter();
    balancers.any(|balancer| balancer.gateway.ip_forward)
}

/// The text of [`FILE`] that sets the planned families; `None` if it does so
/// already.
#[must_use]
pub fn file_text(text: &[u8], plan: &Plan) -> Option<Vec<u8>> {
    let used = Family::BOTH.into_iter().filter(|family| plan.uses(*family));
    with_settings(text, used.map(forwarding_sysctl))
}

/// The text with these settings added as 1, where they are not 1 already. The
/// last line of a setting is the one that counts.
fn with_settings<'a>(text: &[u8], settings: impl Iterator<Item = &'a str>) -> Option<Vec<u8>> {
    let lines = String::from_utf8_lossy(text).into_owned();
    let is_set = |setting: &str| {
        let tables = lines.lines().filter_map(|line| line.split_once('='));
        let mut values = tables
            .filter(|(name, _)| name.trim() == setting)
            .map(|(_, value)| value.trim());
        values.next_back() == Some("1")
    };
    let unset: String = settings
        .filter(|setting| !is_set(setting))
        .map(|setting| format!("{setting} = 1\n"))
        .collect();
    if unset.is_empty() {
        return None;
    }
    let mut new = text.to_vec();
    if new.is_empty() {
        new.extend(b"# So that this host forwards what iptables_balance balances.\n");
    } else if !new.ends_with(b"\n") {
        new.push(b'\n');
    }
    new.extend(unset.into_bytes());
    Some(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_added_once_and_the_last_line_counts() {
        let set = |text: &str| {
            with_settings(text.as_bytes(), ["a.b", "c.d"].into_iter())
                .map(|text| String::from_utf8(text).unwrap())
        };
        let new = set("").unwrap();
        assert!(new.ends_with("\na.b = 1\nc.d = 1\n"), "{new}");
        assert_eq!(set(&new), None);
        assert_eq!(set("a.b=1\nc.d =1"), None);
        assert_eq!(set("a.b=1\nc.d=0").unwrap(), "a.b=1\nc.d=0\nc.d = 1\n");
    }
}
