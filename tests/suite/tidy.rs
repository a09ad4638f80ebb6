//! The absence of things is part of the design. These tests parse the sources
//! (`syn`), so that grouped imports, folders and full paths count alike.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

/// The rooms of `src/`, from the lowest to the highest. A room imports from
/// rooms below it only.
const ROOMS: [&str; 21] = [
    "panic",
    "netfilter",
    "schedule",
    "host",
    "explain",
    "request",
    "state",
    "health",
    "situation",
    "plan",
    "diff",
    "restore",
    "effects",
    "preflight",
    "converge",
    "report",
    "run",
    "status",
    "maintenance",
    "watch",
    "frontend",
];

/// Rooms whose functions cannot fail: no `Result` in any signature.
const PURE: [&str; 4] = ["schedule", "plan", "diff", "restore"];

/// One source file, without its tests.
struct Source {
    path: PathBuf,
    /// The path of its module below the crate: `["host", "netlink"]`.
    module: Vec<String>,
    /// Every path that is used in it, from the crate's root or from outside.
    paths: BTreeSet<Vec<String>>,
    strings: Vec<String>,
    macros: BTreeSet<String>,
    fallible: Vec<String>,
}

impl Source {
    fn read(path: &Path) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let module = path.strip_prefix(&root).unwrap().with_extension("");
        let mut module: Vec<String> = module
            .iter()
            .map(|part| part.to_str().unwrap().to_owned())
            .filter(|part| !["mod", "lib", "main"].contains(&part.as_str()))
            .collect();
        let text = fs::read_to_string(path).unwrap();
        let file =
            syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut source = Self {
            path: path.to_owned(),
            module: std::mem::take(&mut module),
            paths: BTreeSet::new(),
            strings: Vec::new(),
            macros: BTreeSet::new(),
            fallible: Vec::new(),
        };
        source.visit_file(&file);
        source
    }

    fn room(&self) -> &str {
        self.module.first().map_or("lib", String::as_str)
    }

    /// Adds a path; `crate`, `self` and `super` are resolved.
    fn add(&mut self, path: &[String]) {
        let path = match path.first().map(String::as_str) {
            Some("crate" | "iptables_balance") => [&["crate".to_owned()], &path[1..]].concat(),
            Some("self") => self.resolved(0, &path[1..]),
            Some("super") => {
                let up = path.iter().take_while(|part| *part == "super").count();
                self.resolved(up, &path[up..])
            }
            _ => path.to_vec(),
        };
        self.paths.insert(path);
    }

    fn resolved(&self, up: usize, rest: &[String]) -> Vec<String> {
        let module = &self.module[..self.module.len().saturating_sub(up)];
        [&["crate".to_owned()], module, rest].concat()
    }

    fn add_use(&mut self, prefix: &[String], tree: &syn::UseTree) {
        let with = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_use(&with(&path.ident), &path.tree),
            syn::UseTree::Name(name) => self.add(&with(&name.ident)),
            syn::UseTree::Rename(name) => self.add(&with(&name.ident)),
            syn::UseTree::Glob(_) => self.add(prefix),
            syn::UseTree::Group(group) => {
                group
                    .items
                    .iter()
                    .for_each(|item| self.add_use(prefix, item));
            }
        }
    }

    fn imports(&self) -> impl Iterator<Item = &str> {
        let ours = self.paths.iter().filter(|path| path[0] == "crate");
        ours.filter_map(|path| path.get(1)).map(String::as_str)
    }

    fn uses(&self, wanted: &[&str]) -> bool {
        self.paths.iter().any(|path| {
            path.iter()
                .map(String::as_str)
                .take(wanted.len())
                .eq(wanted.iter().copied())
        })
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let is_test = |tokens: &syn::MetaList| tokens.tokens.to_string() == "test";
        attribute.path().is_ident("test")
            || attribute.path().is_ident("cfg") && attribute.meta.require_list().is_ok_and(is_test)
    })
}

impl<'ast> Visit<'ast> for Source {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add_use(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts: Vec<String> = path
            .segments
            .iter()
            .map(|part| part.ident.to_string())
            .collect();
        if parts.len() > 1 {
            self.add(&parts);
        }
        visit::visit_path(self, path);
    }

    fn visit_type_path(&mut self, path: &'ast syn::TypePath) {
        if let Some(only) = path.path.get_ident() {
            self.paths.insert(vec![only.to_string()]);
        }
        visit::visit_type_path(self, path);
    }

    fn visit_macro(&mut self, called: &'ast syn::Macro) {
        if let Some(name) = called.path.segments.last() {
            self.macros.insert(name.ident.to_string());
        }
        visit::visit_macro(self, called);
    }

    fn visit_lit_str(&mut self, text: &'ast syn::LitStr) {
        self.strings.push(text.value());
    }

    fn visit_attribute(&mut self, _: &'ast syn::Attribute) {}

    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        if let syn::ReturnType::Type(_, kind) = &signature.output {
            let mut found = FindResult(false);
            found.visit_type(kind);
            let is_display = signature.ident == "fmt";
            if found.0 && !is_display {
                self.fallible.push(signature.ident.to_string());
            }
        }
        visit::visit_signature(self, signature);
    }
}

struct FindResult(bool);

impl<'ast> Visit<'ast> for FindResult {
    fn visit_path_segment(&mut self, segment: &'ast syn::PathSegment) {
        self.0 |= segment.ident == "Result";
        visit::visit_path_segment(self, segment);
    }
}

fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false if path.extension().is_some_and(|found| found == ending) => found.push(path),
                false => {}
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<Source> {
    let is_test = |path: &PathBuf| {
        path.iter()
            .any(|part| part == "tests" || part == "tests.rs")
    };
    let paths = files("src", "rs").into_iter().filter(|path| !is_test(path));
    paths.map(|path| Source::read(&path)).collect()
}

#[track_caller]
fn assert_none(found: &[String]) {
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn every_room_imports_from_rooms_below_it_only() {
    let floor = |room: &str| ROOMS.iter().position(|known| *known == room);
    let mut upwards = Vec::new();
    let mut seen = BTreeMap::<String, BTreeSet<String>>::new();
    for source in sources() {
        if ["lib", "main"].contains(&source.room()) {
            continue;
        }
        let from = floor(source.room())
            .unwrap_or_else(|| panic!("the room {} is not in ROOMS", source.room()));
        for to in source.imports().filter(|to| *to != source.room()) {
            seen.entry(source.room().to_owned())
                .or_default()
                .insert(to.to_owned());
            if floor(to).is_none_or(|to| to >= from) {
                upwards.push(format!("{} imports {to}", source.path.display()));
            }
        }
    }
    assert_none(&upwards);
    assert!(
        seen["converge"].contains("diff") && seen["host"].contains("netfilter"),
        "{seen:?}"
    );
}

#[test]
fn the_parser_of_this_test_sees_every_form_of_an_import() {
    let text = "use crate::a::{self, b::C, d::{E, F as G}}; use super::h::I; mod tests { fn f() { crate::j::k(); } }
        #[cfg(test)] mod more { use crate::hidden::X; } fn g(l: crate::m::N<super::o::P>) -> Result<(), ()> { \"/proc/x\"; Ok(()) }";
    let mut source = Source {
        path: PathBuf::new(),
        module: vec!["room".to_owned(), "file".to_owned()],
        paths: BTreeSet::new(),
        strings: Vec::new(),
        macros: BTreeSet::new(),
        fallible: Vec::new(),
    };
    source.visit_file(&syn::parse_file(text).unwrap());
    let imports: BTreeSet<&str> = source.imports().collect();
    assert_eq!(imports, BTreeSet::from(["a", "j", "m", "room"]));
    assert_eq!(source.strings, ["/proc/x"]);
    assert_eq!(source.fallible, ["g"]);
}

#[test]
fn only_the_host_starts_processes_and_reads_the_kernels_files() {
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| source.room() != "host") {
        let uses = [
            &["duct"][..],
            &["std", "process", "Command"],
            &["rustix"],
            &["std", "thread", "spawn"],
            &["std", "thread", "Builder"],
        ];
        let kernel = |text: &&String| text.starts_with("/proc") || text.starts_with("/sys");
        if uses.iter().any(|path| source.uses(path))
            || source.strings.iter().any(|text| kernel(&text))
        {
            found.push(source.path.display().to_string());
        }
        // A frontend reads the files that a user names.
        if source.room() != "frontend" && source.uses(&["std", "fs"]) {
            found.push(format!("{}: std::fs", source.path.display()));
        }
    }
    assert_none(&found);
}

#[test]
fn no_shell_is_ever_started() {
    let is_shell = |text: &String| ["sh", "bash", "/bin/sh", "/bin/bash"].contains(&text.as_str());
    let found = sources()
        .into_iter()
        .filter(|source| source.strings.iter().any(is_shell) || source.uses(&["duct_sh"]));
    assert_none(
        &found
            .map(|source| source.path.display().to_string())
            .collect::<Vec<_>>(),
    );
}

#[test]
fn only_the_choice_of_a_frontend_has_standard_output() {
    let mut found = Vec::new();
    for source in sources() {
        let prints = ["print", "println", "eprint", "eprintln"]
            .iter()
            .any(|name| source.macros.contains(*name));
        let streams = [["std", "io", "stdout"], ["std", "io", "stderr"]];
        let is_choice = source.module == ["frontend"];
        let has_streams = streams.iter().any(|path| source.uses(path))
            || source.uses(&["io", "stdout"])
            || source.uses(&["io", "stderr"]);
        if prints || (has_streams && !is_choice) {
            found.push(source.path.display().to_string());
        }
    }
    assert_none(&found);
}

#[test]
fn the_pure_rooms_cannot_fail() {
    let mut checked = BTreeSet::new();
    let mut found = Vec::new();
    for source in sources() {
        if PURE.contains(&source.room()) {
            checked.insert(source.room().to_owned());
            found.extend(
                source
                    .fallible
                    .iter()
                    .map(|name| format!("{}: {name}", source.path.display())),
            );
        }
    }
    assert_eq!(checked.len(), PURE.len());
    assert_none(&found);
}

#[test]
fn no_float_decides_anything() {
    let shown: [&[&str]; 5] = [
        &["status"],
        &["netfilter", "statistic"],
        &["report"],
        &["frontend", "terminal"],
        &["request", "json"],
    ];
    let has_float = |source: &Source| source.uses(&["f64"]) || source.uses(&["f32"]);
    // An explanation only describes rules.
    let describes = |source: &Source| {
        source.room() == "explain"
            || source
                .module
                .starts_with(&["frontend", "seeing"].map(str::to_owned))
    };
    let found = sources().into_iter().filter(|source| {
        has_float(source)
            && !describes(source)
            && !shown.contains(
                &source
                    .module
                    .iter()
                    .map(String::as_str)
                    .collect::<Vec<_>>()
                    .as_slice(),
            )
    });
    assert_none(
        &found
            .map(|source| source.path.display().to_string())
            .collect::<Vec<_>>(),
    );
}

#[test]
fn no_frontend_knows_another() {
    const PROTOCOLS: [&str; 4] = ["ansible", "cfengine", "cli", "json"];
    let mut found = Vec::new();
    for source in sources()
        .iter()
        .filter(|source| source.room() == "frontend")
    {
        let Some(own) = source.module.get(1) else {
            continue;
        };
        let others = PROTOCOLS.iter().filter(|other| *other != own);
        let others = others.filter(|other| source.uses(&["crate", "frontend", other]));
        found.extend(others.map(|other| format!("{} imports {other}", source.path.display())));
    }
    assert_none(&found);
}

/// A longer file is two rooms.
#[test]
fn no_file_is_too_long() {
    const MOST: usize = 600;
    let length = |path: &PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        text.split("#[cfg(test)]").next().unwrap().lines().count()
    };
    let found = files("src", "rs")
        .into_iter()
        .filter(|path| length(path) > MOST);
    assert_none(
        &found
            .map(|path| path.display().to_string())
            .collect::<Vec<_>>(),
    );
}

/// Such a comment points at something instead of naming it.
#[test]
fn no_comment_opens_with_a_relative_clause() {
    const OPENINGS: [&str; 10] = [
        "What", "Whether", "Which", "That", "How", "Those", "Who", "Whose", "Where", "So that",
    ];
    let mut found = Vec::new();
    let paths = ["src", "tests/suite", "tests/root", "tests/fuzz"]
        .iter()
        .filter(|folder| Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).is_dir());
    for path in paths.flat_map(|folder| files(folder, "rs")) {
        let text = fs::read_to_string(&path).unwrap();
        let mut before = "";
        for (number, line) in text.lines().enumerate() {
            let line = line.trim_start();
            let comment = line
                .strip_prefix("///")
                .or_else(|| line.strip_prefix("//!"));
            let opens = !before.starts_with("///") && !before.starts_with("//!");
            if let Some(comment) = comment.filter(|_| opens) {
                let comment = comment.trim_start();
                let is_bad = |opening: &&str| {
                    comment
                        .strip_prefix(*opening)
                        .is_some_and(|rest| rest.starts_with(' '))
                };
                if OPENINGS.iter().any(is_bad) {
                    found.push(format!("{}:{}: {comment}", path.display(), number + 1));
                }
            }
            before = line;
        }
    }
    assert_none(&found);
}

/// A script asks cargo for the program: a target directory may be configured.
#[test]
fn no_script_guesses_the_target_directory() {
    let scripts = ["examples", "benches", "tests", "module-spec"];
    let mut found = Vec::new();
    for path in scripts
        .iter()
        .flat_map(|folder| [files(folder, "sh"), files(folder, "py")].concat())
    {
        let is_foreign = path.iter().any(|part| part == ".venv" || part == "target");
        let text = fs::read_to_string(&path).unwrap();
        if !is_foreign && text.contains("target/release") || text.contains("target/debug") {
            found.push(path.display().to_string());
        }
    }
    assert_none(&found);
}

#[test]
fn every_dependency_says_why() {
    let manifest =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let mut section = "";
    for line in manifest.lines() {
        if line.starts_with('[') {
            section = line;
            assert!(
                !line.contains("dependencies.") || line.contains('#'),
                "{line}"
            );
        } else if section.ends_with("dependencies]") && line.contains(" = ") {
            assert!(line.contains('#'), "{line}");
        }
    }
}
