#!/usr/bin/python
# Copyright: the authors of iptables_balance
# MIT OR Apache-2.0
# Made from the program's types; a test keeps it fresh. The action plugin of this name does the work.

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
  module: balancer
  short_description: Spreads new connections over servers with the kernel's iptables
  version_added: '0.2.0'
  author: The authors of iptables_balance (@iptables_balance)
  description:
    - Computes the rules of C(-m statistic) that give each backend exactly its share, compares them by meaning with those of the host, and applies
          only the difference, atomically.
    - Numbers and booleans may also come as strings, and lists as comma-separated strings.
  requirements:
    - iptables on the managed host, nft or legacy
    - Python on the managed host for tasks with C(async), and only for these
  notes:
    - The host keeps the program in C(/var/lib/iptables_balance/bin), or in C(~/.iptables_balance/bin) of a user who is not root, under a name made
          of its SHA-256. It is sent only where it is missing. Nobody else may write there or in a directory above.
    - The variable C(iptables_balance_directory) names another directory. The directories above it are not checked; make sure that nobody else can
          write there.
  attributes:
    check_mode:
      support: full
      description: Predicts exactly the changes that a run makes.
    diff_mode:
      support: full
      description: Shows the balancer's own chains and the rules that lead into them.
    platform:
      support: full
      platforms: linux
      description: Linux with iptables.
  options:
    name:
      description:
        - 'The name of the balancer and of its chain, 1 to 20 of `A-Z a-z 0-9 _ . -`. The balancer owns the chains NAME and NAME/..., in every table,
              and the rules in other chains that jump to them. It changes nothing else on the host. Alias: `chain`. In CFEngine the name is the
              promiser.'
      type: str
      required: true
      aliases: [chain]
    state:
      description:
        - 'Set up the balancer, or remove it. `absent` needs the name alone and removes everything that the balancer owns.'
      type: str
      default: 'present'
      choices: ['present', 'absent']
    mode:
      description:
        - '`nth` is exact weighted round robin, `random` an independent random choice for each connection. With `hash` the same client goes to the
              same backend: at every connection, after every run, and on every gateway that has the same backends.'
      type: str
      default: 'nth'
      choices: ['nth', 'random', 'hash']
    hash_key:
      description:
        - 'With `mode: hash`: the client is its address, or its address and port. `connection` spreads a crowd that comes from one address; every
              gateway still decides alike.'
      type: str
      default: 'source'
      choices: ['source', 'connection']
    hash_prefix:
      description:
        - 'With `mode: hash`: how many leading bits of the client''s address count. The default of IPv6 is the network of one subscriber, within
              which addresses change.'
      type: dict
      default: {"ipv4":32,"ipv6":64}
    hash_seed:
      description:
        - 'With `mode: hash`: another number gives another, independent choice.'
      type: int
      default: 0
    backends:
      description:
        - 'The backends: each an object, or a string `HOST[:PORT] [weight=N]` (IPv6: `[fd00::1]:5308`). IPv4 and IPv6 may be mixed; connections of
              each family go to the backends of that family. An empty list is an empty pool, see `when_empty`. Required unless `state` is `absent` or
              `balancers` is there.'
      type: list
      elements: raw
      suboptions:
        address:
          description:
            - 'IPv4, IPv6 or a hostname. A hostname stands for all its addresses of the families in use, found anew at each run; they share its
                  weight.'
          type: str
          required: true
        port:
          description:
            - 'The port it listens on; default is the port that the connection came in on.'
          type: int
        weight:
          description:
            - 'Its weight, 0 to 2147483647. A backend of weight 0 gets no new connections and keeps the old ones.'
          type: int
          default: 1
        backup:
          description:
            - 'A backup gets new connections only while no other backend of its family is in service.'
          type: bool
          default: false
    balancers:
      description:
        - 'The balancers of a set, in the place of `backends` and `destination_port`. Each has a `name`, unique in the set, and any attribute that
              describes one balancer; the same attribute beside `balancers` is its default. The list is the whole truth: a balancer that is not in it
              is removed. Where two claim the same traffic in part, the first one listed gets it. In CFEngine a data container or its JSON text.'
      type: list
      elements: dict
      suboptions:
        name:
          description:
            - 'The name of the balancer, unique in the set. Its chains are SET/NAME and SET/NAME/...; SET/NAME has at most 20 characters.'
          type: str
          required: true
        mode:
          description:
            - 'See `mode` of a single balancer; the default is that of the set.'
          type: str
          choices: ['nth', 'random', 'hash']
        hash_key:
          description:
            - 'See `hash_key` of a single balancer; the default is that of the set.'
          type: str
          choices: ['source', 'connection']
        hash_prefix:
          description:
            - 'See `hash_prefix` of a single balancer; the default is that of the set.'
          type: dict
        hash_seed:
          description:
            - 'See `hash_seed` of a single balancer; the default is that of the set.'
          type: int
        backends:
          description:
            - 'See `backends` of a single balancer.'
          type: list
          elements: raw
        protocol:
          description:
            - 'See `protocol` of a single balancer; the default is that of the set.'
          type: str
          choices: ['tcp', 'udp', 'sctp', 'dccp']
        destination_port:
          description:
            - 'See `destination_port` of a single balancer.'
          type: list
          elements: str
        destination:
          description:
            - 'See `destination` of a single balancer; the default is that of the set.'
          type: list
          elements: str
        source:
          description:
            - 'See `source` of a single balancer; the default is that of the set.'
          type: list
          elements: str
        in_interface:
          description:
            - 'See `in_interface` of a single balancer; the default is that of the set.'
          type: str
        layout:
          description:
            - 'See `layout` of a single balancer; the default is that of the set.'
          type: str
          choices: ['auto', 'flat', 'tree']
        local_traffic:
          description:
            - 'See `local_traffic` of a single balancer; the default is that of the set.'
          type: bool
        masquerade:
          description:
            - 'See `masquerade` of a single balancer; the default is that of the set.'
          type: str
          choices: ['no', 'balanced', 'all']
        snat_address:
          description:
            - 'See `snat_address` of a single balancer; the default is that of the set.'
          type: list
          elements: str
        out_interface:
          description:
            - 'See `out_interface` of a single balancer; the default is that of the set.'
          type: str
        forward:
          description:
            - 'See `forward` of a single balancer; the default is that of the set.'
          type: bool
        when_empty:
          description:
            - 'See `when_empty` of a single balancer; the default is that of the set.'
          type: str
          choices: ['reject', 'drop', 'pass']
        disconnect:
          description:
            - 'See `disconnect` of a single balancer; the default is that of the set.'
          type: str
          choices: ['udp', 'always', 'never']
        health:
          description:
            - 'See `health` of a single balancer; the default is that of the set, as a whole.'
          type: dict
    protocol:
      description:
        - 'The transport protocol that is balanced.'
      type: str
      default: 'tcp'
      choices: ['tcp', 'udp', 'sctp', 'dccp']
    destination_port:
      description:
        - 'The ports that are balanced: a port, a range `"a:b"`, the name of a service, or a list of up to 15 of these. Required unless `state` is
              `absent` or `balancers` is there; `"0:65535"` is every port.'
      type: list
      elements: str
    destination:
      description:
        - 'Balance only connections to this address or network, to a list of them, or with `local` to any address of this host.'
      type: list
      elements: str
    source:
      description:
        - 'Balance only connections from this address or network, or from a list of them.'
      type: list
      elements: str
    in_interface:
      description:
        - 'Balance only connections that arrive on this interface. A trailing `+` stands for any ending of the name.'
      type: str
    layout:
      description:
        - 'One chain, or a tree of chains; `auto` takes the one with the fewest rules to visit.'
      type: str
      default: 'auto'
      choices: ['auto', 'flat', 'tree']
    jump:
      description:
        - 'The position in PREROUTING of a new rule that jumps to the chain. A rule that exists already stays where it is.'
      type: str
      default: 'append'
      choices: ['append', 'insert']
    local_traffic:
      description:
        - 'Also connections that this host makes itself (OUTPUT), but not those to loopback addresses unless `destination` names them.'
      type: bool
      default: false
    masquerade:
      description:
        - 'Rewrite source addresses, so that replies come back through this host: `balanced` (or true) for the balanced connections, `all` for
              everything that leaves `out_interface`.'
      type: str
      default: 'no'
      choices: ['no', 'balanced', 'all']
    snat_address:
      description:
        - 'With `masquerade`: SNAT to this address instead of MASQUERADE; one, or one for each family.'
      type: list
      elements: str
    out_interface:
      description:
        - 'Restrict `masquerade` to packets that leave by this interface; required with `all`.'
      type: str
    forward:
      description:
        - 'Accept the balanced connections, both directions, in filter''s FORWARD, before any rule there that drops or rejects.'
      type: bool
      default: false
    ip_forward:
      description:
        - 'Switch on forwarding for the families in use, with `persist` after a reboot too; `absent` leaves it on. When false and it is off: a
              warning.'
      type: bool
      default: false
    when_empty:
      description:
        - 'The answer to new connections when no backend has a weight: a refusal at once (a TCP reset; ICMP for the other protocols), no answer, or
              the way that they would take without a balancer.'
      type: str
      default: 'reject'
      choices: ['reject', 'drop', 'pass']
    disconnect:
      description:
        - 'End the connections to a backend that was removed, by deleting their conntrack entries: only UDP, so that clients move to another backend
              at once; every protocol; or none.'
      type: str
      default: 'udp'
      choices: ['udp', 'always', 'never']
    health:
      description:
        - 'Probe the backends, and give no new connections to one that is down. With the verdicts of a running `watch` for the same name, else by
              probing at each run. The connections of a backend that goes down are ended as `disconnect` says.'
      type: dict
      suboptions:
        type:
          description:
            - '`tcp`: the connection is accepted. `http`: GET is answered with an expected status.'
          type: str
          default: 'tcp'
          choices: ['tcp', 'http']
        port:
          description:
            - 'The port that is probed; default is the port of the backend. Required where a backend has none.'
          type: int
        path:
          description:
            - 'With `http`: the path that is asked for.'
          type: str
          default: '/'
        host:
          description:
            - 'With `http`: the header `Host`; default is the address that is probed.'
          type: str
        status:
          description:
            - 'With `http`: the expected status, a code, a range, or a list of these.'
          type: raw
          default: '200-399'
        interval:
          description:
            - 'Seconds from the beginning of one check to the next, decimals allowed.'
          type: float
          default: 2
        timeout:
          description:
            - 'Seconds that a check may take, decimals allowed.'
          type: float
          default: 1
        rise:
          description:
            - 'Good checks in a row that bring a backend up.'
          type: int
          default: 2
        fall:
          description:
            - 'Failed checks in a row that take a backend down.'
          type: int
          default: 3
        panic_threshold:
          description:
            - 'Per cent of the weight. When no more than this is healthy, health is ignored and every backend that is no backup gets connections.
                  With 0 that is when nothing is healthy. `never`: an unhealthy pool is an empty pool, see `when_empty`.'
          type: raw
          default: 0
    drain_timeout:
      description:
        - 'Seconds to wait after a change until backends that are removed, held or of weight 0 have no connections left, decimals allowed. The result
              says in `draining` what is left then.'
      type: float
      default: 0
    persist:
      description:
        - 'Make it survive a reboot: true finds the distribution''s own files; one path serves one family, with both in use it takes the mapping.
              With `absent`, the files named are cleaned too.'
      type: raw
      default: false
    variant:
      description:
        - 'The iptables variant; `auto` is the variant of the host''s `iptables-save`.'
      type: str
      default: 'auto'
      choices: ['auto', 'nft', 'legacy']
    wait:
      description:
        - 'Seconds to wait for locks that other programs hold; 0 counts as 1, the least that iptables accepts.'
      type: int
      default: 10
"""

EXAMPLES = r"""
  - name: Balance port 5308
    iptables_balance.gateway.balancer:
      name: CFENGINE
      destination_port: 5308
      backends:
        - 10.9.0.1:5308
        - 10.9.0.2:5308
        - 10.9.0.3:5308
        - 10.9.0.4:5308
    register: balancer

  - name: Balance the web ports of this host's own addresses
    iptables_balance.gateway.balancer:
      name: WEB
      mode: random
      destination: local
      destination_port: [80, 443]
      backends:
        - {address: 10.9.0.1, weight: 30}
        - {address: 10.9.0.2, weight: 30}
        - {address: 10.9.0.3, weight: 30}
        - {address: 10.9.0.4, weight: 10}
        - {address: "fd09::1", weight: 2}
        - {address: "fd09::2", weight: 1}

  - name: Balance the web ports of this host's own addresses
    iptables_balance.gateway.balancer:
      name: SHOP
      mode: hash
      hash_prefix: {ipv4: 24, ipv6: 56}
      destination: local
      destination_port: [80, 443]
      backends:
        - {address: 10.9.0.1, weight: 30}
        - {address: 10.9.0.2, weight: 30}
        - {address: 10.9.0.3, weight: 30}
        - {address: 10.9.0.4, weight: 10}
        - {address: "fd09::1", weight: 2}
        - {address: "fd09::2", weight: 1}

  - name: Balance port 5308
    iptables_balance.gateway.balancer:
      name: CFENGINE
      destination_port: 5308
      backends:
        - 10.9.0.1:5308
        - 10.9.0.2:5308
        - 10.9.0.3:5308
        - 10.9.0.4:5308
      masquerade: balanced
      forward: true
      ip_forward: true
      persist: "{{ after_a_reboot }}"

  - name: Balance every service
    iptables_balance.gateway.balancer:
      name: EDGE
      masquerade: balanced
      forward: true
      ip_forward: true
      balancers:
        - name: hubs
          destination_port: 5308
          backends: [10.9.0.1:5308, 10.9.0.2:5308, 10.9.0.3:5308, 10.9.0.4:5308]
        - name: web
          destination_port: [80, 443]
          mode: random
          backends:
            - {address: 10.9.0.1, port: 5308, weight: 3}
            - {address: 10.9.0.2, port: 5308}
        - name: dns
          protocol: udp
          destination_port: 53
          backends: [10.9.0.3, 10.9.0.4]
        - name: games
          protocol: udp
          destination_port: "27000:27050"
          destination: local
          disconnect: always
          backends: [10.9.0.1, 10.9.0.2]

  - name: Remove what nth.yml, random.yml and hash.yml made
    iptables_balance.gateway.balancer:
      name: "{{ item }}"
      state: absent
    loop:
      - CFENGINE
      - WEB
      - SHOP
"""

RETURN = r"""
  balancers:
    description: 'The balancers of a set, in the order of the request.'
    returned: always
    type: list
    elements: dict
    contains:
      changed:
        description: 'True if something of it was changed, or would be in check mode.'
        returned: always
        type: bool
      name:
        description: 'Its name in the set.'
        returned: always
        type: str
  changed:
    description: 'True if something was changed, or would be in check mode.'
    returned: always
    type: bool
  changes:
    description: 'The changes that were made, or would be made in check mode, in order.'
    returned: always
    type: list
    elements: dict
    contains:
      action:
        description: 'The kind of change.'
        returned: always
        type: str
      before:
        description: 'The rule that was replaced, or the setting and its former value.'
        returned: always
        type: str
      chain:
        description: 'The chain.'
        returned: always
        type: str
      family:
        description: 'The family of the rules, the sysctl or the connections. Left out for a file that belongs to no family.'
        returned: always
        type: str
      rule:
        description: 'The rule that was added or deleted, as `iptables-save` spells it.
With `set_sysctl` the setting and its new value, with `write_file` the path, with `delete_connections`
a filter in the spelling of `conntrack`.'
        returned: always
        type: str
      table:
        description: 'The table of the rule or chain.'
        returned: always
        type: str
  diff:
    description: 'The rules and settings of the balancer before and after, if a diff was requested. Of a set, what changes.'
    returned: always
    type: dict
    contains:
      after:
        description: 'A text.'
        returned: always
        type: str
      after_header:
        description: 'A text.'
        returned: always
        type: str
      before:
        description: 'A text.'
        returned: always
        type: str
      before_header:
        description: 'A text.'
        returned: always
        type: str
  distribution:
    description: 'The share of each backend, computed from the rules as they are after the run.'
    returned: always
    type: list
    elements: dict
    contains:
      address:
        description: 'Its address.'
        returned: always
        type: str
      balancer:
        description: 'Its balancer, in a set.'
        returned: always
        type: str
      family:
        description: 'The family of its connections.'
        returned: always
        type: str
      health:
        description: 'The verdict of its health checks. Left out where it is not checked.'
        returned: always
        type: str
      in_service:
        description: 'True if it gets new connections.'
        returned: always
        type: bool
      port:
        description: 'Its port. Left out where connections keep the port that they were addressed to.'
        returned: always
        type: int
      share:
        description: 'Its share of its family''s new connections, 0 to 1: the double nearest to the exact share.'
        returned: always
        type: float
      weight:
        description: 'Its weight as requested.'
        returned: always
        type: int
  draining:
    description: 'The connections that backends of weight 0, held and removed ones have left, if `drain_timeout` asked for it.'
    returned: always
    type: list
    elements: dict
    contains:
      address:
        description: 'Its address.'
        returned: always
        type: str
      balancer:
        description: 'Its balancer, in a set.'
        returned: always
        type: str
      connections:
        description: 'The number of its connections.'
        returned: always
        type: int
      port:
        description: 'Its port. Left out where connections keep the port that they were addressed to.'
        returned: always
        type: int
  failed:
    description: 'True if the desired state was not reached.'
    returned: always
    type: bool
  iptables_version:
    description: 'The version of iptables, such as `1.8.9`. Left out where its dump names none.'
    returned: always
    type: str
  msg:
    description: 'The outcome in one sentence.'
    returned: always
    type: str
  name:
    description: 'The name of the balancer.'
    returned: always
    type: str
  state:
    description: 'The state that was requested.'
    returned: always
    type: str
  variant:
    description: 'The iptables variant that was used.'
    returned: always
    type: str
  warnings:
    description: 'Warnings: things that work, but may not be what you want.'
    returned: always
    type: list
    elements: str
"""
