//! The name of a balancer and the chains that it owns.

/// The name of a balancer and of its chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    /// Longer names would leave no room for `NAME/...` in the 28 bytes of a chain.
    const MOST: usize = 20;

    /// # Errors
    /// The mistake, worded to follow the name in backticks.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > Self::MOST || !text.bytes().all(is_allowed) {
            return Err(format!("is not 1 to {} of A-Z a-z 0-9 _ . -", Self::MOST));
        }
        if text.starts_with('-') {
            return Err("begins with `-`, which iptables takes for an option".into());
        }
        if RESERVED.contains(&text) {
            return Err("is a built-in chain or a target of iptables; take another name".into());
        }
        Ok(Self(text.to_owned()))
    }

    /// The main chain's name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Checks the name of a balancer in a set of this name.
    ///
    /// # Errors
    /// The mistake, worded to follow the name in backticks.
    pub fn check_member(&self, text: &str) -> Result<(), String> {
        let most = Self::MOST.saturating_sub(self.0.len() + 1);
        if most == 0 {
            return Err(format!(
                "cannot be added: the set's name `{}` leaves no room, since `NAME/BALANCER` has at most {} characters",
                self.0,
                Self::MOST
            ));
        }
        if text.is_empty() || text.len() > most || !text.bytes().all(is_allowed) {
            return Err(format!(
                "is not 1 to {most} of A-Z a-z 0-9 _ . -; `{}/` and the name have at most {} characters",
                self.0,
                Self::MOST
            ));
        }
        if text.starts_with('-') {
            return Err("begins with `-`".into());
        }
        Ok(())
    }

    /// The name of the balancer that a chain of a set belongs to: `web` for `SET/web`
    /// and `SET/web/...`, none for the set's own chains `SET` and `SET//...`.
    #[must_use]
    pub fn member<'a>(&self, chain: &'a str) -> Option<&'a str> {
        let rest = chain.strip_prefix(self.as_str())?.strip_prefix('/')?;
        let name = rest.split('/').next()?;
        (!name.is_empty()).then_some(name)
    }

    /// Returns true for a chain of this balancer: `NAME` or `NAME/...`.
    #[must_use]
    pub fn owns(&self, chain: &str) -> bool {
        chain
            .strip_prefix(self.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

/// Returns true if no chain can have the name, since it is a built-in chain's or a
/// target's.
#[must_use]
pub fn is_target(name: &str) -> bool {
    RESERVED.contains(&name)
}

fn is_allowed(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_.-".contains(&byte)
}

/// The built-in chains, the targets whose names iptables refuses for a chain,
/// and two that it uses itself (iptables 1.8.9, `iptables-extensions(8)`).
#[rustfmt::skip]
const RESERVED: [&str; 63] = [
    "standard", "ERROR",
    "PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "ACCEPT", "DROP", "QUEUE",
    "RETURN", "AUDIT", "CHECKSUM", "CLASSIFY", "CLUSTERIP", "CONNMARK", "CONNSECMARK", "CT",
    "DNAT", "DNPT", "DSCP", "ECN", "HL", "HMARK", "IDLETIMER", "LED", "LOG", "MARK", "MASQUERADE",
    "NETMAP", "NFLOG", "NFQUEUE", "NOTRACK", "RATEEST", "REDIRECT", "REJECT", "SAME", "SECMARK",
    "SET", "SNAT", "SNPT", "SYNPROXY", "TCPMSS", "TCPOPTSTRIP", "TEE", "TOS", "TPROXY", "TRACE",
    "TTL", "ULOG", "MIRROR", "BALANCE", "ROUTE", "TARPIT", "DELUDE", "CHAOS", "ECHO", "IPMARK",
    "LOGMARK", "RAWDNAT", "RAWSNAT", "SYSRQ", "ACCOUNT",
];
