//! The attributes of a request as they arrive. JSON Schema, Ansible's
//! documentation and the reference are made from the comments here. The parent
//! module decides which values are valid.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use crate::netfilter::Variant;

/// A chain of iptables that spreads new connections over backends.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "iptables_balance request")]
pub(crate) struct RequestAttributes {
    /// The name of the balancer and of its chain, 1 to 20 of `A-Z a-z 0-9 _ .
    /// -`. The balancer owns the chains NAME and NAME/..., in every table, and
    /// the rules in other chains that jump to them. It changes nothing else on
    /// the host. Alias: `chain`. In CFEngine the name is the promiser.
    #[serde(alias = "chain")]
    #[schemars(with = "String", regex(pattern = r"^[A-Za-z0-9_.][A-Za-z0-9_.-]{0,19}$"), extend("aliases" = ["chain"]))]
    pub name: Option<Value>,

    /// Set up the balancer, or remove it. `absent` needs the name alone and
    /// removes everything that the balancer owns.
    #[schemars(with = "Option<DesiredState>", extend("default" = "present"))]
    pub state: Option<Value>,

    /// `nth` is exact weighted round robin, `random` an independent random choice for each connection. With `hash` the same
    /// client goes to the same backend: at every connection, after every run, and on every gateway that has the same backends.
    #[schemars(with = "Option<Mode>", extend("default" = "nth"))]
    pub mode: Option<Value>,

    /// With `mode: hash`: the client is its address, or its address and port. `connection` spreads a crowd that comes from one
    /// address; every gateway still decides alike.
    #[schemars(with = "Option<HashKey>", extend("default" = "source"))]
    pub hash_key: Option<Value>,

    /// With `mode: hash`: how many leading bits of the client's address count. The default of IPv6 is the network of
    /// one subscriber, within which addresses change.
    #[schemars(with = "Option<HashPrefixForm>", extend("default" = {"ipv4": 32, "ipv6": 64}))]
    pub hash_prefix: Option<Value>,

    /// With `mode: hash`: another number gives another, independent choice.
    #[schemars(with = "Option<u32>", extend("default" = 0))]
    pub hash_seed: Option<Value>,

    /// The backends: each an object, or a string `HOST[:PORT] [weight=N]`
    /// (IPv6: `[fd00::1]:5308`). IPv4 and IPv6 may be mixed; connections of
    /// each family go to the backends of that family. An empty list is an empty
    /// pool, see `when_empty`. Required unless `state` is `absent` or `balancers` is there.
    #[schemars(with = "Option<Vec<BackendForm>>")]
    pub backends: Option<Value>,

    /// The balancers of a set, in the place of `backends` and `destination_port`. Each has a `name`, unique in the set,
    /// and any attribute that describes one balancer; the same attribute beside `balancers` is its default. The list is the
    /// whole truth: a balancer that is not in it is removed. Where two claim the same traffic in part, the first one
    /// listed gets it. In CFEngine a data container or its JSON text.
    #[schemars(with = "Option<Vec<BalancerAttributes>>")]
    pub balancers: Option<Value>,

    /// The transport protocol that is balanced.
    #[schemars(with = "Option<crate::netfilter::Protocol>", extend("default" = "tcp"))]
    pub protocol: Option<Value>,

    /// The ports that are balanced: a port, a range `"a:b"`, the name of a
    /// service, or a list of up to 15 of these. Required unless `state` is
    /// `absent` or `balancers` is there; `"0:65535"` is every port.
    #[schemars(with = "Option<OneOrList<PortForm>>")]
    pub destination_port: Option<Value>,

    /// Balance only connections to this address or network, to a list of them,
    /// or with `local` to any address of this host.
    #[schemars(with = "Option<OneOrList<String>>")]
    pub destination: Option<Value>,

    /// Balance only connections from this address or network, or from a list of
    /// them.
    #[schemars(with = "Option<OneOrList<String>>")]
    pub source: Option<Value>,

    /// Balance only connections that arrive on this interface. A trailing `+`
    /// stands for any ending of the name.
    #[schemars(with = "Option<String>")]
    pub in_interface: Option<Value>,

    /// One chain, or a tree of chains; `auto` takes the one with the fewest rules to visit.
    #[schemars(with = "Option<Layout>", extend("default" = "auto"))]
    pub layout: Option<Value>,

    /// The position in PREROUTING of a new rule that jumps to the chain. A rule
    /// that exists already stays where it is.
    #[schemars(with = "Option<Jump>", extend("default" = "append"))]
    pub jump: Option<Value>,

    /// Also connections that this host makes itself (OUTPUT), but not those to loopback addresses unless `destination` names them.
    #[schemars(with = "Option<bool>", extend("default" = false))]
    pub local_traffic: Option<Value>,

    /// Rewrite source addresses, so that replies come back through this host:
    /// `balanced` (or true) for the balanced connections, `all` for everything
    /// that leaves `out_interface`.
    #[schemars(with = "Option<MasqueradeForm>", extend("default" = "no"))]
    pub masquerade: Option<Value>,

    /// With `masquerade`: SNAT to this address instead of MASQUERADE; one, or one for each family.
    #[schemars(with = "Option<OneOrList<std::net::IpAddr>>")]
    pub snat_address: Option<Value>,

    /// Restrict `masquerade` to packets that leave by this interface; required
    /// with `all`.
    #[schemars(with = "Option<String>")]
    pub out_interface: Option<Value>,

    /// Accept the balanced connections, both directions, in filter's FORWARD, before any rule there that drops or rejects.
    #[schemars(with = "Option<bool>", extend("default" = false))]
    pub forward: Option<Value>,

    /// Switch on forwarding for the families in use, with `persist` after a reboot too; `absent` leaves it on.
    /// When false and it is off: a warning.
    #[schemars(with = "Option<bool>", extend("default" = false))]
    pub ip_forward: Option<Value>,

    /// The answer to new connections when no backend has a weight: a refusal at
    /// once (a TCP reset; ICMP for the other protocols), no answer, or the way
    /// that they would take without a balancer.
    #[schemars(with = "Option<WhenEmpty>", extend("default" = "reject"))]
    pub when_empty: Option<Value>,

    /// End the connections to a backend that was removed, by deleting their
    /// conntrack entries: only UDP, so that clients move to another backend at
    /// once; every protocol; or none.
    #[schemars(with = "Option<Disconnect>", extend("default" = "udp"))]
    pub disconnect: Option<Value>,

    /// Probe the backends, and give no new connections to one that is down. With the verdicts of a running `watch`
    /// for the same name, else by probing at each run. The connections of a backend that goes down are ended as
    /// `disconnect` says.
    #[schemars(with = "Option<HealthAttributes>")]
    pub health: Option<Value>,

    /// Seconds to wait after a change until backends that are removed, held or of weight 0 have no connections left,
    /// decimals allowed. The result says in `draining` what is left then.
    #[schemars(with = "Option<f64>", range(max = 86400), extend("default" = 0))]
    pub drain_timeout: Option<Value>,

    /// Make it survive a reboot: true finds the distribution's own files; one path serves one family,
    /// with both in use it takes the mapping. With `absent`, the files named are cleaned too.
    #[schemars(with = "Option<PersistForm>", extend("default" = false))]
    pub persist: Option<Value>,

    /// The iptables variant; `auto` is the variant of the host's
    /// `iptables-save`.
    #[schemars(with = "Option<VariantChoice>", extend("default" = "auto"))]
    pub variant: Option<Value>,

    /// Seconds to wait for locks that other programs hold; 0 counts as
    /// 1, the least that iptables accepts.
    #[schemars(with = "Option<u32>", range(max = 3600), extend("default" = 10))]
    pub wait: Option<Value>,
}

/// A balancer of a set.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Balancer")]
pub(crate) struct BalancerAttributes {
    /// The name of the balancer, unique in the set. Its chains are SET/NAME and SET/NAME/...; SET/NAME has at most 20
    /// characters.
    #[schemars(
        with = "String",
        regex(pattern = r"^[A-Za-z0-9_.][A-Za-z0-9_.-]{0,17}$")
    )]
    pub name: Option<Value>,

    /// See `mode` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<Mode>")]
    pub mode: Option<Value>,

    /// See `hash_key` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<HashKey>")]
    pub hash_key: Option<Value>,

    /// See `hash_prefix` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<HashPrefixForm>")]
    pub hash_prefix: Option<Value>,

    /// See `hash_seed` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<u32>")]
    pub hash_seed: Option<Value>,

    /// See `backends` of a single balancer.
    #[schemars(with = "Option<Vec<BackendForm>>")]
    pub backends: Option<Value>,

    /// See `protocol` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<crate::netfilter::Protocol>")]
    pub protocol: Option<Value>,

    /// See `destination_port` of a single balancer.
    #[schemars(with = "Option<OneOrList<PortForm>>")]
    pub destination_port: Option<Value>,

    /// See `destination` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<OneOrList<String>>")]
    pub destination: Option<Value>,

    /// See `source` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<OneOrList<String>>")]
    pub source: Option<Value>,

    /// See `in_interface` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<String>")]
    pub in_interface: Option<Value>,

    /// See `layout` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<Layout>")]
    pub layout: Option<Value>,

    /// See `local_traffic` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<bool>")]
    pub local_traffic: Option<Value>,

    /// See `masquerade` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<MasqueradeForm>")]
    pub masquerade: Option<Value>,

    /// See `snat_address` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<OneOrList<std::net::IpAddr>>")]
    pub snat_address: Option<Value>,

    /// See `out_interface` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<String>")]
    pub out_interface: Option<Value>,

    /// See `forward` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<bool>")]
    pub forward: Option<Value>,

    /// See `when_empty` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<WhenEmpty>")]
    pub when_empty: Option<Value>,

    /// See `disconnect` of a single balancer; the default is that of the set.
    #[schemars(with = "Option<Disconnect>")]
    pub disconnect: Option<Value>,

    /// See `health` of a single balancer; the default is that of the set, as a whole.
    #[schemars(with = "Option<HealthAttributes>")]
    pub health: Option<Value>,
}

/// A backend.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Backend")]
pub(crate) struct BackendAttributes {
    /// IPv4, IPv6 or a hostname. A hostname stands for all its addresses of the families in use, found anew at each run;
    /// they share its weight.
    #[schemars(with = "String")]
    pub address: Option<Value>,

    /// The port it listens on; default is the port that the connection came in on.
    #[schemars(with = "Option<u16>", range(min = 1))]
    pub port: Option<Value>,

    /// Its weight, 0 to 2147483647. A backend of weight 0 gets no new
    /// connections and keeps the old ones.
    #[schemars(with = "Option<u32>", range(max = 2_147_483_647), extend("default" = 1))]
    pub weight: Option<Value>,

    /// A backup gets new connections only while no other backend of its family is in service.
    #[schemars(with = "Option<bool>", extend("default" = false))]
    pub backup: Option<Value>,
}

/// The health checks of a balancer's backends.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "HealthChecks")]
pub(crate) struct HealthAttributes {
    /// `tcp`: the connection is accepted. `http`: GET is answered with an expected status.
    #[schemars(with = "Option<CheckType>", extend("default" = "tcp"))]
    pub r#type: Option<Value>,

    /// The port that is probed; default is the port of the backend. Required where a backend has none.
    #[schemars(with = "Option<u16>", range(min = 1))]
    pub port: Option<Value>,

    /// With `http`: the path that is asked for.
    #[schemars(with = "Option<String>", regex(pattern = "^/[!-~]*$"), extend("default" = "/"))]
    pub path: Option<Value>,

    /// With `http`: the header `Host`; default is the address that is probed.
    #[schemars(with = "Option<String>")]
    pub host: Option<Value>,

    /// With `http`: the expected status, a code, a range, or a list of these.
    #[schemars(with = "Option<OneOrList<StatusForm>>", extend("default" = "200-399"))]
    pub status: Option<Value>,

    /// Seconds from the beginning of one check to the next, decimals allowed.
    #[schemars(with = "Option<f64>", range(min = 0.05, max = 3600), extend("default" = 2))]
    pub interval: Option<Value>,

    /// Seconds that a check may take, decimals allowed.
    #[schemars(with = "Option<f64>", range(min = 0.01, max = 3600), extend("default" = 1))]
    pub timeout: Option<Value>,

    /// Good checks in a row that bring a backend up.
    #[schemars(with = "Option<u32>", range(min = 1, max = 1000), extend("default" = 2))]
    pub rise: Option<Value>,

    /// Failed checks in a row that take a backend down.
    #[schemars(with = "Option<u32>", range(min = 1, max = 1000), extend("default" = 3))]
    pub fall: Option<Value>,

    /// Per cent of the weight. When no more than this is healthy, health is ignored and every backend that is no backup gets
    /// connections. With 0 that is when nothing is healthy. `never`: an unhealthy pool is an empty pool, see `when_empty`.
    #[schemars(with = "Option<ThresholdForm>", extend("default" = 0))]
    pub panic_threshold: Option<Value>,
}

#[derive(JsonSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum StatusForm {
    Code(#[schemars(range(min = 100, max = 599))] u16),
    Range(#[schemars(regex(pattern = "^[1-5][0-9]{2}(-[1-5][0-9]{2})?$"))] String),
}

#[derive(JsonSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum ThresholdForm {
    PerCent(#[schemars(range(max = 100))] u32),
    Word(Never),
}

#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(dead_code)]
enum Never {
    Never,
}

#[derive(JsonSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum BackendForm {
    Text(String),
    Entry(BackendAttributes),
}

#[derive(JsonSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum PortForm {
    Port(#[schemars(range(min = 1))] u16),
    Range(
        #[schemars(regex(
            pattern = "^([0-9]{1,5}(:[0-9]{1,5})?|[A-Za-z0-9._+-]*[A-Za-z][A-Za-z0-9._+-]*)$"
        ))]
        String,
    ),
}

#[derive(JsonSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum OneOrList<T> {
    One(T),
    List(Vec<T>),
}

#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
#[allow(dead_code)]
struct HashPrefixForm {
    /// Of an IPv4 address.
    #[schemars(range(min = 1, max = 32))]
    ipv4: Option<u8>,
    /// Of an IPv6 address.
    #[schemars(range(min = 1, max = 128))]
    ipv6: Option<u8>,
}

#[derive(JsonSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum MasqueradeForm {
    Flag(bool),
    Scope(Masquerade),
}

#[derive(JsonSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum PersistForm {
    Flag(bool),
    Path(String),
    Families {
        ipv4: Option<String>,
        ipv6: Option<String>,
    },
}

/// Declares an enum together with the words that requests use for it, so that
/// parser, schema and error messages cannot disagree.
macro_rules! words {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, JsonSchema)]
        $(#[$outer])*
        pub enum $name {
            $($(#[$inner])* #[serde(rename = $word)] $variant),+
        }

        impl $name {
            pub(super) const WORDS: &'static [(&'static str, Self)] = &[$(($word, Self::$variant)),+];

            /// The word that requests and results use.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }
    };
}

words!(
    /// The desired state.
    #[schemars(rename = "State")]
    DesiredState {
        /// There is one, as described.
        #[default]
        Present = "present",
        /// Nothing of it is left.
        Absent = "absent",
    }
);
words!(
    /// The choice of a backend for a connection.
    Mode {
        /// In turn: exact weighted round robin.
        #[default]
        Nth = "nth",
        /// By chance, independently for each connection.
        Random = "random",
        /// By a hash of the client.
        Hash = "hash",
    }
);
words!(
    /// The client that `mode: hash` decides by.
    HashKey {
        /// Its address.
        #[default]
        Source = "source",
        /// Its address and port.
        Connection = "connection",
    }
);
words!(
    /// The arrangement of the rules.
    Layout {
        /// Whichever visits the fewest rules.
        #[default]
        Auto = "auto",
        /// One chain.
        Flat = "flat",
        /// A tree of chains.
        Tree = "tree",
    }
);
words!(
    /// The position of a new jump rule.
    Jump {
        /// At the end of PREROUTING.
        #[default]
        Append = "append",
        /// At the head of PREROUTING.
        Insert = "insert",
    }
);
words!(
    /// The connections whose source address is rewritten.
    Masquerade {
        /// None.
        #[default]
        No = "no",
        /// The balanced connections.
        Balanced = "balanced",
        /// Everything that leaves `out_interface`.
        All = "all",
    }
);
words!(
    /// The answer to new connections when no backend has a weight: a refusal at
    /// once (a TCP reset; ICMP for the other protocols), no answer, or the way
    /// that they would take without a balancer.
    WhenEmpty {
        /// Refused at once.
        #[default]
        Reject = "reject",
        /// No answer.
        Drop = "drop",
        /// They pass as if there were no balancer.
        Pass = "pass",
    }
);
words!(
    /// The protocols whose connections are ended when a backend is removed.
    Disconnect {
        /// UDP, whose clients would otherwise stay with the removed backend.
        #[default]
        Udp = "udp",
        /// Every protocol's.
        Always = "always",
        /// None.
        Never = "never",
    }
);
words!(
    /// The kind of a health check.
    #[schemars(rename = "CheckType")]
    CheckType {
        /// The connection is accepted.
        #[default]
        Tcp = "tcp",
        /// GET is answered with an expected status.
        Http = "http",
    }
);
words!(
    /// The requested variant.
    VariantChoice {
        /// The variant of the host's `iptables-save`.
        #[default]
        Auto = "auto",
        /// `iptables-nft`
        Nft = "nft",
        /// `iptables-legacy`
        Legacy = "legacy",
    }
);

impl VariantChoice {
    /// The variant, if one is requested by name.
    #[must_use]
    pub fn required(self) -> Option<Variant> {
        match self {
            Self::Auto => None,
            Self::Nft => Some(Variant::Nft),
            Self::Legacy => Some(Variant::Legacy),
        }
    }
}
