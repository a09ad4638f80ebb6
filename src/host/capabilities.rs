//! The capabilities of this process.

use rustix::thread::{CapabilitySet, capabilities};

/// The capabilities that iptables needs and this process lacks, as a remark;
/// empty if it has all. The messages of iptables itself mislead: "you must be
/// root", also to root in a container, or that it cannot initialize a table.
pub fn lacking() -> String {
    const NEEDED: [(CapabilitySet, &str); 2] = [
        (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
        (CapabilitySet::NET_RAW, "CAP_NET_RAW"),
    ];
    let Ok(sets) = capabilities(None) else {
        return String::new();
    };
    let is_lacking = |(right, _): &&(CapabilitySet, &str)| !sets.effective.contains(*right);
    let lacking: Vec<&str> = NEEDED
        .iter()
        .filter(is_lacking)
        .map(|(_, name)| *name)
        .collect();
    if lacking.is_empty() {
        return String::new();
    }
    format!(
        " (iptables needs the capability CAP_NET_ADMIN, and iptables-legacy CAP_NET_RAW too; this process does not have {}: \
         run it as root, as with `become: true`, or give that to its container)",
        lacking.join(" and ")
    )
}
