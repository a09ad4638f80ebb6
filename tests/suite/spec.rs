//! The documents that are made from the program's types are fresh. `UPDATE=1
//! cargo test` writes them again.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use iptables_balance::frontend::schema::{Kind, text};
use serde_json::{Value, json};

pub const ROOT: &str = env!("CARGO_MANIFEST_DIR");

pub fn assert_fresh(path: &str, made: &str) {
    let file = Path::new(ROOT).join(path);
    if std::env::var_os("UPDATE").is_some() {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, made).unwrap();
    }
    let kept = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        kept == made,
        "{path} is not what the program's types say; `UPDATE=1 cargo test` writes it anew"
    );
}

pub fn schema(kind: Kind) -> Value {
    serde_json::from_str(&text(kind)).unwrap()
}

#[test]
fn the_schemas_are_fresh() {
    assert_fresh(
        "module-spec/request.schema.json",
        &(text(Kind::Request) + "\n"),
    );
    assert_fresh(
        "module-spec/result.schema.json",
        &(text(Kind::Result) + "\n"),
    );
    assert_fresh(
        "module-spec/status.schema.json",
        &(text(Kind::Status) + "\n"),
    );
    assert_fresh(
        "module-spec/explain.schema.json",
        &(text(Kind::Explain) + "\n"),
    );
    for (word, kind) in [
        ("explain", Kind::Explain),
        ("request", Kind::Request),
        ("result", Kind::Result),
        ("status", Kind::Status),
    ] {
        let program = env!("CARGO_BIN_EXE_iptables_balance");
        let output = Command::new(program)
            .args(["schema", word])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), text(kind) + "\n");
    }
}

#[test]
fn examples_are_valid_requests() {
    let requests = jsonschema::validator_for(&schema(Kind::Request)).unwrap();
    let mut seen = 0;
    for entry in fs::read_dir(Path::new(ROOT).join("examples/json")).unwrap() {
        let request: Value =
            serde_json::from_str(&fs::read_to_string(entry.unwrap().path()).unwrap()).unwrap();
        assert!(requests.is_valid(&request), "{request}");
        seen += 1;
    }
    assert!(seen >= 4);
    for (request, valid) in [
        (json!({"name": "W", "mode": "fair"}), false),
        (json!({"name": "W", "nme": 1}), false),
        (json!({"name": "W", "hash_prefix": {"ipv4": 33}}), false),
        (json!({"name": "W", "hash_prefix": {"ipv5": 3}}), false),
        (
            json!({"name": "W", "mode": "hash", "hash_key": "connection", "hash_prefix": {"ipv4": 24}, "hash_seed": 7}),
            true,
        ),
        (json!({"destination_port": 80}), false),
        (
            json!({"name": "W", "backends": [{"address": "192.0.2.1", "wieght": 1}]}),
            false,
        ),
        (
            json!({"name": "W", "backends": ["192.0.2.1", {"address": "192.0.2.2", "port": 80, "weight": 0}], "destination_port": ["80", "1:2"], "persist": {"ipv4": "/a"}, "masquerade": true}),
            true,
        ),
    ] {
        assert_eq!(requests.is_valid(&request), valid, "{request}");
    }
}

/// One attribute, as the documents need it.
pub struct Attribute {
    pub name: String,
    pub description: String,
    pub default: Option<Value>,
    pub choices: Vec<(String, String)>,
    pub aliases: Vec<String>,
    pub required: bool,
    pub ansible_type: &'static str,
    pub elements: Option<&'static str>,
}

/// In the order in which they are declared, which is the order of the contract.
pub const ORDER: [&str; 28] = [
    "name",
    "state",
    "mode",
    "hash_key",
    "hash_prefix",
    "hash_seed",
    "backends",
    "balancers",
    "protocol",
    "destination_port",
    "destination",
    "source",
    "in_interface",
    "layout",
    "jump",
    "local_traffic",
    "masquerade",
    "snat_address",
    "out_interface",
    "forward",
    "ip_forward",
    "when_empty",
    "disconnect",
    "health",
    "drain_timeout",
    "persist",
    "variant",
    "wait",
];

pub fn attributes(schema: &Value, order: &[&str]) -> Vec<Attribute> {
    let properties = schema["properties"].as_object().unwrap();
    assert_eq!(
        properties.len(),
        order.len(),
        "an attribute is missing from the order"
    );
    order
        .iter()
        .map(|name| attribute(schema, name, &properties[*name]))
        .collect()
}

fn attribute(schema: &Value, name: &str, property: &Value) -> Attribute {
    let (ansible_type, elements) = match name {
        "backends" => ("list", Some("raw")),
        "balancers" => ("list", Some("dict")),
        "destination_port" | "destination" | "source" | "snat_address" => ("list", Some("str")),
        "local_traffic" | "forward" | "ip_forward" | "backup" => ("bool", None),
        "persist" | "status" | "panic_threshold" => ("raw", None),
        "health" | "hash_prefix" => ("dict", None),
        "drain_timeout" | "interval" | "timeout" => ("float", None),
        "hash_seed" | "wait" | "port" | "weight" | "rise" | "fall" => ("int", None),
        _ => ("str", None),
    };
    let strings = |value: &Value| {
        value
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    Attribute {
        name: name.to_owned(),
        description: property["description"].as_str().unwrap().replace('\n', " "),
        default: property
            .get("default")
            .filter(|value| !value.is_null())
            .cloned(),
        choices: choices(schema, property),
        aliases: strings(&property["aliases"]),
        required: strings(&schema["required"]).contains(&name.to_owned()),
        ansible_type,
        elements,
    }
}

/// The words of the enum behind a property, with their descriptions.
fn choices(schema: &Value, property: &Value) -> Vec<(String, String)> {
    let referred = |value: &Value| {
        value["$ref"]
            .as_str()
            .and_then(|path| schema.pointer(path.trim_start_matches('#')).cloned())
    };
    let candidates = property["anyOf"].as_array().cloned().unwrap_or_default();
    for candidate in candidates.iter().chain([property]) {
        let Some(target) = referred(candidate) else {
            continue;
        };
        let words: Vec<_> = target["oneOf"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|word| {
                Some((
                    word["const"].as_str()?.to_owned(),
                    word["description"].as_str().unwrap_or_default().to_owned(),
                ))
            })
            .collect();
        if !words.is_empty() {
            return words;
        }
        let plain: Vec<_> = target["enum"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|word| Some((word.as_str()?.to_owned(), String::new())))
            .collect();
        if !plain.is_empty() {
            return plain;
        }
        let nested = choices(schema, &target);
        if !nested.is_empty() {
            return nested;
        }
    }
    Vec::new()
}

pub fn backend_attributes(schema: &Value) -> Vec<Attribute> {
    let mut inner = schema["$defs"]["Backend"].clone();
    inner["$defs"] = schema["$defs"].clone();
    attributes(&inner, &["address", "port", "weight", "backup"])
}

pub fn health_attributes(schema: &Value) -> Vec<Attribute> {
    let mut inner = schema["$defs"]["HealthChecks"].clone();
    inner["$defs"] = schema["$defs"].clone();
    let order = [
        "type",
        "port",
        "path",
        "host",
        "status",
        "interval",
        "timeout",
        "rise",
        "fall",
        "panic_threshold",
    ];
    let mut attributes = attributes(&inner, &order);
    for attribute in &mut attributes {
        if ["status", "panic_threshold"].contains(&attribute.name.as_str()) {
            attribute.choices.clear();
        }
    }
    attributes
}

/// The attributes of a balancer in a set.
pub fn member_attributes(schema: &Value) -> Vec<Attribute> {
    let mut inner = schema["$defs"]["Balancer"].clone();
    inner["$defs"] = schema["$defs"].clone();
    let own = [
        "state",
        "variant",
        "wait",
        "persist",
        "ip_forward",
        "jump",
        "drain_timeout",
        "balancers",
    ];
    let order = ORDER.iter().filter(|name| !own.contains(name));
    attributes(&inner, &order.copied().collect::<Vec<_>>())
}

/// A YAML string on one line.
fn yaml(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn scalar(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), yaml)
}

fn option(text: &mut String, attribute: &Attribute, indent: usize, inner: &[Attribute]) {
    let pad = " ".repeat(indent);
    let _ = writeln!(text, "{pad}{}:\n{pad}  description:", attribute.name);
    let _ = writeln!(text, "{pad}    - {}", yaml(&attribute.description));
    let _ = writeln!(text, "{pad}  type: {}", attribute.ansible_type);
    if let Some(elements) = attribute.elements {
        let _ = writeln!(text, "{pad}  elements: {elements}");
    }
    if attribute.required {
        let _ = writeln!(text, "{pad}  required: true");
    }
    if let Some(default) = &attribute.default {
        let _ = writeln!(text, "{pad}  default: {}", scalar(default));
    }
    if !attribute.aliases.is_empty() {
        let _ = writeln!(text, "{pad}  aliases: [{}]", attribute.aliases.join(", "));
    }
    if !attribute.choices.is_empty() {
        let words: Vec<String> = attribute
            .choices
            .iter()
            .map(|(word, _)| yaml(word))
            .collect();
        let _ = writeln!(text, "{pad}  choices: [{}]", words.join(", "));
    }
    if !inner.is_empty() {
        let _ = writeln!(text, "{pad}  suboptions:");
        inner
            .iter()
            .for_each(|attribute| option(text, attribute, indent + 4, &[]));
    }
}

fn returned(text: &mut String, schema: &Value, properties: &Value, indent: usize) {
    let pad = " ".repeat(indent);
    for (name, property) in properties.as_object().unwrap() {
        let refer = |value: &Value| {
            value["$ref"]
                .as_str()
                .and_then(|path| schema.pointer(path.trim_start_matches('#')))
        };
        let plain = property["type"]
            .as_str()
            .or_else(|| property["type"][0].as_str());
        let target = refer(property).or_else(|| {
            property["anyOf"]
                .as_array()
                .and_then(|forms| forms.iter().find_map(refer))
        });
        let kind = match (plain, target.and_then(|target| target["type"].as_str())) {
            (Some("boolean"), _) => "bool",
            (Some("array"), _) => "list",
            (Some("number"), _) => "float",
            (Some("integer"), _) => "int",
            (None, Some("object")) => "dict",
            _ => "str",
        };
        let always = schema["required"]
            .as_array()
            .unwrap()
            .contains(&json!(name))
            || indent > 0;
        let _ = writeln!(
            text,
            "{pad}{name}:\n{pad}  description: {}",
            yaml(property["description"].as_str().unwrap_or("A text."))
        );
        let _ = writeln!(
            text,
            "{pad}  returned: {}\n{pad}  type: {kind}",
            if always { "always" } else { "when it applies" }
        );
        if kind == "list" {
            let item = refer(&property["items"]);
            let _ = writeln!(
                text,
                "{pad}  elements: {}",
                if item.is_some() { "dict" } else { "str" }
            );
            if let Some(item) = item {
                let _ = writeln!(text, "{pad}  contains:");
                returned(text, schema, &item["properties"], indent + 4);
            }
        } else if let Some(target) = target.filter(|_| kind == "dict") {
            let _ = writeln!(text, "{pad}  contains:");
            returned(text, schema, &target["properties"], indent + 4);
        }
    }
}

/// The module by its full name, as the example playbooks call it.
const COLLECTION_MODULE: &str = "iptables_balance.gateway.balancer";

fn playbook(name: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join("examples/ansible").join(name)).unwrap()
}

/// The tasks of a playbook that use the module, brought to the margin.
fn tasks(playbook: &str) -> String {
    let body = playbook.split("  tasks:\n").nth(1).unwrap();
    let ours = body
        .split("\n\n")
        .filter(|task| task.contains(COLLECTION_MODULE));
    let line = |line: &str| format!("  {}\n", line.strip_prefix("    ").unwrap_or(line));
    let task = |task: &str| task.lines().map(line).collect::<String>();
    ours.map(task).collect::<Vec<_>>().join("\n")
}

/// The description of a module, indented by two.
fn documentation(module: &str, version_added: &str) -> String {
    let request = schema(Kind::Request);
    let mut text = format!(
        "  module: {module}\n\
         \x20 short_description: Spreads new connections over servers with the kernel's iptables\n\
         \x20 version_added: '{version_added}'\n  author: The authors of iptables_balance (@iptables_balance)\n  description:\n\
         \x20   - Computes the rules of C(-m statistic) that give each backend exactly its share, compares them by meaning with those of the host, and applies only the difference, atomically.\n\
         \x20   - Numbers and booleans may also come as strings, and lists as comma-separated strings.\n\
         \x20 requirements:\n    - iptables on the managed host, nft or legacy\n{}\
         \x20 attributes:\n    check_mode:\n      support: full\n      description: Predicts exactly the changes that a run makes.\n\
         \x20   diff_mode:\n      support: full\n      description: Shows the balancer's own chains and the rules that lead into them.\n\
         \x20   platform:\n      support: full\n      platforms: linux\n      description: Linux with iptables.\n  options:\n",
        notes(module),
    );
    let (inner, members) = (backend_attributes(&request), member_attributes(&request));
    let checks = health_attributes(&request);
    for attribute in attributes(&request, &ORDER) {
        let inner = match attribute.name.as_str() {
            "backends" => inner.as_slice(),
            "health" => checks.as_slice(),
            "balancers" => members.as_slice(),
            _ => &[],
        };
        option(&mut text, &attribute, 4, inner);
    }
    text
}

fn notes(module: &str) -> &'static str {
    match module {
        "balancer" => {
            "    - Python on the managed host for tasks with C(async), and only for these\n\
             \x20 notes:\n\
             \x20   - The host keeps the program in C(/var/lib/iptables_balance/bin), or in C(~/.iptables_balance/bin) of a user who is not root, under a name made of its SHA-256. It is sent only where it is missing. Nobody else may write there or in a directory above.\n\
             \x20   - The variable C(iptables_balance_directory) names another directory. The directories above it are not checked; make sure that nobody else can write there.\n"
        }
        _ => "    - Python is not needed on the managed host\n",
    }
}

/// The tasks of the example playbooks, with the module called by this name.
fn examples(module: &str) -> String {
    let tasks = [
        "nth.yml",
        "random.yml",
        "hash.yml",
        "gateway.yml",
        "edge.yml",
        "absent.yml",
    ]
    .map(|name| tasks(&playbook(name)))
    .join("\n");
    tasks.replace(&format!("{COLLECTION_MODULE}:"), &format!("{module}:"))
}

fn return_values() -> String {
    let result = schema(Kind::Result);
    let mut values = String::new();
    returned(&mut values, &result, &result["properties"], 2);
    values
}

#[test]
fn ansibles_documentation_is_fresh() {
    let text = format!(
        "# Made from the program's types; a test keeps it fresh.\n---\nDOCUMENTATION:\n{}EXAMPLES: |\n{}RETURN:\n{}",
        documentation("iptables_balance", "0.1.0"),
        examples("iptables_balance"),
        return_values(),
    );
    assert_fresh("module-spec/ansible/iptables_balance.yml", &text);
}

/// The same YAML with lines of at most 150 columns: a line break within a scalar
/// means a space. The rules for collections allow 160.
fn wrapped(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        let mut rest = line.to_owned();
        let indent = rest.len() - rest.trim_start().len() + 6;
        while let Some(at) = rest.get(..150).and_then(|start| start.rfind(' ')) {
            lines.push(rest[..at].to_owned());
            rest = " ".repeat(indent) + &rest[at + 1..];
        }
        lines.push(rest);
    }
    lines.join("\n") + "\n"
}

/// Ansible reads the documentation of an action plugin in a module of its name.
#[test]
fn the_documentation_in_the_collection_is_fresh() {
    let text = format!(
        "#!/usr/bin/python\n# Copyright: the authors of iptables_balance\n# MIT OR Apache-2.0\n\
         # Made from the program's types; a test keeps it fresh. The action plugin of this name does the work.\n\n\
         from __future__ import absolute_import, division, print_function\n\n__metaclass__ = type\n\n\
         DOCUMENTATION = r\"\"\"\n{}\"\"\"\n\nEXAMPLES = r\"\"\"\n{}\"\"\"\n\nRETURN = r\"\"\"\n{}\"\"\"\n",
        documentation("balancer", "0.2.0"),
        examples(COLLECTION_MODULE),
        return_values(),
    );
    let file = "module-spec/ansible/collection/plugins/modules/balancer.py";
    assert_fresh(file, &wrapped(&text));
}

/// One version for the program and everything that ships it.
#[test]
fn the_collection_has_the_version_of_the_program() {
    let file = Path::new(ROOT).join("module-spec/ansible/collection/galaxy.yml");
    let version = format!("\nversion: {}\n", env!("CARGO_PKG_VERSION"));
    assert!(fs::read_to_string(file).unwrap().contains(&version));
}

#[test]
fn the_reference_is_fresh() {
    let request = schema(Kind::Request);
    let mut text = String::from(
        "# The attributes\n\nThe same names and meanings from Ansible, CFEngine and plain JSON. Numbers also come as strings (`\"5308\"`, `\"70.0000\"`), \
         booleans in every spelling that Ansible knows, lists as a list, a comma-separated string, a JSON text, or `{\"0\": .., \"1\": ..}`. \
         An attribute that is null counts as left out; an unknown one is an error.\n\n| name | default | meaning |\n|---|---|---|\n",
    );
    let mut row = |attribute: &Attribute, prefix: &str| {
        let default = attribute.default.as_ref().map_or(
            if attribute.required {
                "required".into()
            } else {
                String::new()
            },
            |value| {
                format!(
                    "`{}`",
                    value.as_str().map_or(value.to_string(), str::to_owned)
                )
            },
        );
        let mut meaning = attribute.description.clone();
        for (word, description) in attribute
            .choices
            .iter()
            .filter(|(_, description)| !description.is_empty())
        {
            let _ = write!(
                meaning,
                "<br>`{word}`: {}",
                description.trim_end_matches('.')
            );
        }
        if attribute
            .choices
            .iter()
            .all(|(_, description)| description.is_empty())
            && !attribute.choices.is_empty()
        {
            let words: Vec<String> = attribute
                .choices
                .iter()
                .map(|(word, _)| format!("`{word}`"))
                .collect();
            let _ = write!(meaning, "<br>One of {}", words.join(", "));
        }
        let _ = writeln!(
            text,
            "| `{prefix}{}` | {default} | {} |",
            attribute.name,
            meaning.replace('|', "\\|")
        );
    };
    let inner = backend_attributes(&request);
    for attribute in attributes(&request, &ORDER) {
        row(&attribute, "");
        if attribute.name == "backends" {
            inner
                .iter()
                .for_each(|attribute| row(attribute, "backends[]."));
        }
        if attribute.name == "balancers" {
            row(&member_attributes(&request)[0], "balancers[].");
        }
        if attribute.name == "health" {
            let checks = health_attributes(&request);
            checks.iter().for_each(|check| row(check, "health."));
        }
    }
    text += &fs::read_to_string(Path::new(ROOT).join("module-spec/reference.in.md")).unwrap();
    assert_fresh("module-spec/REFERENCE.md", &text);
}

/// Every file that the documents link to exists.
#[test]
fn links_lead_somewhere() {
    let mut seen = BTreeMap::new();
    for document in ["README.md", "module-spec/REFERENCE.md", "CHANGELOG.md"] {
        let file = Path::new(ROOT).join(document);
        let text = fs::read_to_string(&file).unwrap();
        for target in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let path = target.split('#').next().unwrap();
            if !path.is_empty() && !path.contains("://") {
                seen.insert(
                    format!("{document}: {path}"),
                    file.parent().unwrap().join(path).exists(),
                );
            }
        }
    }
    assert!(
        !seen.is_empty() && seen.values().all(|exists| *exists),
        "{seen:?}"
    );
}
