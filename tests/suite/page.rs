//! The page of `explain --format html`, in a real browser: what it loads, sorts, finds,
//! announces and prints, its contrast and width, and the text of others in it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use iptables_balance::converge::outcome::RunMode;
use iptables_balance::explain::{HostFacts, explain, read};
use iptables_balance::frontend::seeing::html::page;
use iptables_balance::netfilter::Family;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::browser::Browser;
use crate::fake::Fake;
use crate::model::Model;
use crate::property;
use crate::spec::ROOT;

fn page_of(dump: &str) -> String {
    let tables = read(dump.as_bytes(), None).unwrap_or_else(|error| panic!("{error}\n{dump}"));
    page(&explain(&tables, &[], &HostFacts::default()))
}

fn recorded(name: &str) -> String {
    let file = Path::new(ROOT).join("tests/explained").join(name);
    page_of(&std::fs::read_to_string(file).unwrap())
}

fn address(number: usize) -> String {
    format!("10.9.{}.{}:5308", number / 250, number % 250 + 1)
}

/// The rules that this program makes for so many backends, whose weights count from 1 to 3.
fn planned(backends: usize, layout: &str) -> String {
    let backends: Vec<Value> = (0..backends)
        .map(|number| json!({"address": address(number).trim_end_matches(":5308"), "port": 5308, "weight": number % 3 + 1}))
        .collect();
    let request = json!({"name": "W", "destination_port": 5308, "mode": "random", "layout": layout, "backends": backends});
    let host = Fake::new(Model::new(false), Model::new(true));
    property::run(&host, &request, RunMode::Apply);
    let dump = host.model(Family::Ipv4).lock().unwrap().save();
    page_of(&dump)
}

/// Long names, IPv6, conditions and counters: everything that is wide.
fn wide() -> String {
    let chain = "a-name-of-28-characters-long";
    let mut dump = format!(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:{chain} - [0:0]\n[9:9] -A PREROUTING -s 2001:db8:aaaa:bbbb:cccc:dddd:eeee:0/112 -p tcp -m tcp --dport 80 -j {chain}\n"
    );
    for left in (1..=12_u32).rev() {
        let _ = writeln!(
            dump,
            "[18446744073709551:18446744073709551615] -A {chain} -p tcp -m comment --comment \"{}\" -m statistic --mode nth --every {} --packet 0 \
             -j DNAT --to-destination [2001:db8:aaaa:bbbb:cccc:dddd:eeee:{left:04x}]:65535",
            "c".repeat(256),
            left + 1
        );
    }
    page_of(&(dump + "COMMIT\n"))
}

/// Every recorded dump, a chain of 4 backends, wide ones and many.
fn pages() -> Vec<(String, String)> {
    let folder = Path::new(ROOT).join("tests/explained");
    let names = std::fs::read_dir(folder).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names: BTreeSet<String> = names
        .filter(|name| {
            Path::new(name)
                .extension()
                .is_some_and(|ending| ending == "txt")
        })
        .collect();
    let mut pages: Vec<_> = names
        .into_iter()
        .map(|name| (name.clone(), recorded(&name)))
        .collect();
    assert!(pages.len() >= 9);
    pages.push(("4 backends".to_owned(), planned(4, "flat")));
    pages.push(("wide".to_owned(), wide()));
    pages.push(("a tree".to_owned(), planned(1000, "tree")));
    pages
}

const DESTINATIONS: &str =
    "[...document.querySelectorAll('tbody th')].map((cell) => cell.textContent)";
const SHOWN: &str = "[...document.querySelectorAll('tbody tr')].filter((row) => row.checkVisibility()).map((row) => row.cells[0].textContent)";
const SORTED: &str = "[...document.querySelectorAll('thead th')].map((head) => head.getAttribute('aria-sort') ?? '-').join(' ')";
const NEWS: &str = "document.querySelector('[role=status]').textContent";

/// Types into the search box of a page.
fn search(text: &str) -> String {
    format!(
        "{{ const input = document.querySelector('input'); input.value = '{text}'; \
         input.dispatchEvent(new Event('input')); }}"
    )
}

#[test]
fn a_page_loads_nothing_and_reports_no_error() {
    let mut browser = Browser::start();
    for (name, html) in pages() {
        browser.open(&html);
        browser.value("new Promise((done) => setTimeout(done, 50))");
        let of = |method: &str| {
            let events = browser.events.iter();
            events
                .filter(|event| event["method"] == method)
                .collect::<Vec<_>>()
        };
        let requests = of("Network.requestWillBeSent");
        assert_eq!(requests.len(), 1, "{name}: {requests:?}");
        assert_eq!(requests[0]["params"]["type"], "Document", "{name}");
        for method in [
            "Log.entryAdded",
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
        ] {
            assert!(of(method).is_empty(), "{name}: {:?}", of(method));
        }
        // The script was run.
        let heads = browser.value("document.querySelectorAll('thead th').length === document.querySelectorAll('thead th button').length");
        assert_eq!(heads, true, "{name}");
    }
}

#[test]
fn a_table_sorts_and_finds_and_announces_it() {
    let mut browser = Browser::start();
    browser.open(&planned(30, "flat"));
    let tree = browser.call("Accessibility.getFullAXTree", &json!({}));
    let nodes: BTreeSet<(String, String)> = tree["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| {
            let of = |key: &str| node[key]["value"].as_str().unwrap_or_default().to_owned();
            (
                of("role"),
                of("name").split_whitespace().collect::<Vec<_>>().join(" "),
            )
        })
        .collect();
    for (role, name) in [
        ("searchbox", "Search destinations"),
        ("button", "destination"),
        ("button", "share"),
        ("button", "exactly"),
        ("region", "Shares"),
        ("table", "Shares W IPv4, table nat, connections with -p tcp"),
        ("status", ""),
        ("main", ""),
        ("link", "Skip to the chains"),
    ] {
        let node = (role.to_owned(), name.to_owned());
        assert!(nodes.contains(&node), "{node:?} is not in {nodes:#?}");
    }
    let mut expected: Vec<String> = (0..30).map(address).collect();
    let click =
        |column: usize| format!("document.querySelectorAll('thead button')[{column}].click()");
    browser.value(&click(0));
    assert_eq!(
        browser.value(DESTINATIONS),
        json!(expected),
        "10 comes after 9"
    );
    assert_eq!(browser.text(SORTED), "ascending - - -");
    assert_eq!(browser.text(NEWS), "Sorted by destination, ascending");
    browser.value(&click(0));
    expected.reverse();
    assert_eq!(browser.value(DESTINATIONS), json!(expected));
    assert_eq!(browser.text(SORTED), "descending - - -");
    // Shares begin with the largest: the weights count from 1 to 3.
    browser.value(&click(1));
    let by_weight = |weight: usize| {
        (0..30)
            .filter(move |number| number % 3 + 1 == weight)
            .map(address)
    };
    let largest: BTreeSet<String> = by_weight(3).collect();
    let first: Vec<String> = serde_json::from_value(browser.value(DESTINATIONS)).unwrap();
    assert_eq!(
        first[..10].iter().cloned().collect::<BTreeSet<_>>(),
        largest
    );
    assert_eq!(browser.text(NEWS), "Sorted by share, descending");
    browser.value(&click(2));
    browser.value(&click(2));
    let smallest: BTreeSet<String> = by_weight(1).collect();
    let first: Vec<String> = serde_json::from_value(browser.value(DESTINATIONS)).unwrap();
    assert_eq!(
        first[..10].iter().cloned().collect::<BTreeSet<_>>(),
        smallest
    );
    assert_eq!(browser.text(SORTED), "- - ascending -");
    // The search finds any part of a row, and the order stays.
    browser.value(&search(" 0.7:53 "));
    assert_eq!(browser.value(SHOWN), json!([address(6)]));
    assert_eq!(browser.text(NEWS), "1 of 30 destinations");
    browser.value(&search("no such server"));
    assert_eq!(browser.value(SHOWN), json!([]));
    assert_eq!(browser.text(NEWS), "0 of 30 destinations");
    browser.value(&search(""));
    assert_eq!(browser.value(SHOWN), browser.value(DESTINATIONS));
    assert_eq!(browser.text(NEWS), "All 30 destinations");
}

/// The element that has the focus, and its outline if a keyboard shall see one.
const FOCUS: &str = "(() => {
    const at = document.activeElement, style = getComputedStyle(at);
    const seen = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2 && at.checkVisibility();
    return `${at.localName} ${seen ? 'seen' : 'unseen'} ${at.localName === 'body' ? '' : at.textContent.trim().slice(0, 18)}`;
})()";

#[test]
fn a_keyboard_is_enough() {
    let mut browser = Browser::start();
    // With mistakes, a search box and a fold.
    let mut dump = "*nat\n:W - [0:0]\n".to_owned();
    for number in 0..60 {
        let _ = writeln!(
            dump,
            "-A W -p tcp -m statistic --mode nth --every 60 --packet 0 -j DNAT --to-destination {}",
            address(number)
        );
    }
    browser.open(&page_of(&(dump + "COMMIT\n")));
    let mut stops = Vec::new();
    for _ in 0..20 {
        browser.press("Tab");
        let stop = browser.text(FOCUS);
        if stop.starts_with("body") {
            break;
        }
        stops.push(stop);
    }
    let expected = [
        "a seen Skip to the chains",
        "a seen line 3: -A W -p tc",
        "a seen line 62: -A W -p t",
        "summary seen W 60 rules",
        "a seen same-every",
        "summary seen 52 more rules",
        "input seen",
        "div seen destinationshareex",
        "button seen destination",
        "button seen share",
        "button seen exactly",
    ];
    let stops: Vec<&str> = stops.iter().map(|stop| stop.trim()).collect();
    assert_eq!(stops, expected);
    // The search box is reached and typed into.
    browser.value("document.querySelectorAll('summary')[1].focus()");
    assert_eq!(
        browser.value("document.querySelectorAll('details')[1].open"),
        false
    );
    for (key, is_open) in [("Enter", true), (" ", false)] {
        browser.press(key);
        assert_eq!(
            browser.value("document.querySelectorAll('details')[1].open"),
            is_open,
            "{key:?}"
        );
    }
    browser.press("Tab");
    browser.insert("10.9.0.5");
    assert_eq!(browser.text(NEWS), "11 of 60 destinations");
    browser.press("Tab");
    browser.press("Tab");
    browser.press("Enter");
    assert_eq!(browser.text(SORTED), "ascending - -");
    browser.press(" ");
    assert_eq!(browser.text(SORTED), "descending - -");
    assert_eq!(browser.text(NEWS), "Sorted by destination, descending");
    // The table scrolls.
    browser.value(&search(""));
    browser.value("document.querySelector('.scroll').focus()");
    browser.press("End");
    let scrolled = "new Promise((done) => { const look = (left) => { const top = document.querySelector('.scroll').scrollTop; \
        if (top > 100 || left === 0) done(top); else setTimeout(() => look(left - 1), 50); }; look(100); })";
    assert!(browser.value(scrolled).as_f64().unwrap() > 100.0);
    // Links lead to the rule, also into a fold, and back to the mistake.
    browser.value("document.querySelectorAll('.findings a')[1].focus()");
    browser.press("Enter");
    let focus = "new Promise((done) => { const look = (left) => { const at = document.activeElement; \
        if (at.id.includes('-rule-') || left === 0) done(at.id + ' ' + at.checkVisibility()); else setTimeout(() => look(left - 1), 50); }; look(100); })";
    assert_eq!(browser.text(focus), "chain-0-rule-59 true");
    browser.press("Tab");
    browser.press("Enter");
    assert_eq!(browser.text("location.hash"), "#chain-0-mistake-1");
    // The first link skips the head.
    browser.open(&recorded("tutorial-nth.txt"));
    browser.press("Tab");
    browser.press("Enter");
    assert_eq!(browser.text("document.activeElement.id"), "chains");
}

#[test]
fn no_page_is_wider_than_a_phone() {
    let mut browser = Browser::start();
    browser.size(360, 740);
    for (name, html) in pages() {
        browser.open(&html);
        browser
            .value("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })");
        let width = browser.value("document.documentElement.scrollWidth");
        assert_eq!(width, 360, "{name}");
    }
}

#[test]
fn a_thousand_backends_are_printed_whole_on_few_pages() {
    let mut browser = Browser::start();
    for (layout, with_script) in [("flat", true), ("tree", false)] {
        browser.scripts(with_script);
        browser.open(&planned(1000, layout));
        if with_script {
            browser.value(&search("10.9.0.7:"));
            assert_eq!(browser.value(SHOWN), json!([address(6)]));
        }
        let folds = "document.querySelectorAll('details:not([open])').length";
        let folded = browser.value(folds);
        assert!(folded.as_u64().unwrap() > 0);
        let start = Instant::now();
        let (pages, text) = browser.print();
        let took = start.elapsed();
        println!("{layout}, script {with_script}: {pages} pages in {took:?}");
        assert!(pages <= 45, "{layout}: {pages} pages");
        // Some 3 s. Boxes that are laid out one within the other take 40 s.
        assert!(took < Duration::from_secs(30), "{layout}: {took:?}");
        // Once in the rules, once in the table.
        let words: Vec<&str> = text.split_whitespace().collect();
        for number in 0..1000 {
            let address = address(number);
            let found = words.iter().filter(|word| **word == address).count();
            assert_eq!(found, 2, "{layout}, script {with_script}: {address}");
        }
        assert_eq!(browser.value(folds), folded, "folds are as before");
    }
}

#[test]
fn without_a_script_everything_is_there() {
    let mut browser = Browser::start();
    browser.scripts(false);
    browser.open(&planned(60, "flat"));
    assert_eq!(
        browser.value("document.querySelectorAll('button').length"),
        0
    );
    assert_eq!(
        browser.value("document.querySelector('input').checkVisibility()"),
        false
    );
    let all: Vec<String> = (0..60).map(address).collect();
    let mut shown: Vec<String> = serde_json::from_value(browser.value(SHOWN)).unwrap();
    let mut sorted = all.clone();
    sorted.sort();
    shown.sort();
    assert_eq!(shown, sorted);
    // Folds open without it.
    let seen =
        "[...document.querySelectorAll('.step')].filter((step) => step.checkVisibility()).length";
    assert_eq!(browser.value(seen), 8);
    browser.value("document.querySelectorAll('summary')[1].focus()");
    browser.press("Enter");
    assert_eq!(browser.value(seen), 60);
}

/// The text with less contrast than 4.5:1 to the colour behind it, and the bars and borders with less than 3:1
/// to what is beside them. No text may lie on a bar: a bar is a gradient, at the top of a rule or at the foot of a cell.
const DIM: &str = r"(() => {
    const channels = (color) => color.match(/[\d.]+/g).map(Number);
    const light = (color) => {
        const [r, g, b] = channels(color).slice(0, 3).map((part) => part / 255)
            .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (one, other) => {
        const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const color = getComputedStyle(at).backgroundColor;
            const parts = channels(color);
            if (parts.length < 4 || parts[3] === 1) return color;
            if (parts[3] > 0) return 'half transparent';
        }
        return 'rgb(255, 255, 255)';
    };
    const bad = new Set();
    let texts = 0;
    document.querySelectorAll('details').forEach((fold) => { fold.open = true; });
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || ['script', 'style'].includes(element.localName) || !element.checkVisibility()) continue;
        texts += 1;
        const back = behind(element);
        if (back === 'half transparent' || !(contrast(getComputedStyle(element).color, back) >= 4.5))
            bad.add(`${element.localName}.${element.className} ${getComputedStyle(element).color} on ${back}`);
        const holder = element.closest('.step, td.bar');
        if (holder === null || getComputedStyle(holder).backgroundImage === 'none') continue;
        const range = document.createRange();
        range.selectNodeContents(walker.currentNode);
        const box = holder.getBoundingClientRect(), height = parseFloat(getComputedStyle(holder).backgroundSize.split(' ').at(-1));
        const isStep = holder.classList.contains('step');
        const offset = parseFloat(isStep ? getComputedStyle(holder).backgroundPositionY : 0);
        if (isStep && offset < -parseFloat(getComputedStyle(holder).paddingTop)) bad.add('a bar that is cut off');
        const top = isStep ? box.top + parseFloat(getComputedStyle(holder).paddingTop) + offset : box.bottom - parseFloat(getComputedStyle(holder).paddingBottom);
        for (const line of range.getClientRects()) {
            if (isStep ? line.top < top + height - 4 : line.bottom > top + 4) bad.add(`text on a bar: ${holder.textContent}`);
        }
    }
    const root = document.createElement('i');
    document.body.append(root);
    const variable = (name) => { root.style.color = `var(--${name})`; return getComputedStyle(root).color; };
    for (const bar of ['taken', 'onward', 'nobody'])
        for (const beside of ['rest', 'track', 'paper'])
            if (!(contrast(variable(bar), variable(beside)) >= 3)) bad.add(`--${bar} beside --${beside}`);
    if (!(contrast(variable('edge'), variable('paper')) >= 3)) bad.add('--edge on --paper');
    if (!(contrast(variable('link'), variable('paper')) >= 3)) bad.add('--link on --paper');
    root.remove();
    return { texts, bad: [...bad] };
})()";

#[test]
fn text_stands_out_in_light_dark_and_print() {
    let mut browser = Browser::start();
    let mut backs = BTreeSet::new();
    for (medium, scheme) in [("screen", "light"), ("screen", "dark"), ("print", "dark")] {
        browser.medium(medium, scheme);
        for html in [recorded("firehol.txt"), planned(60, "tree"), wide()] {
            browser.open(&html);
            let found = browser.value(DIM);
            assert_eq!(found["bad"], json!([]), "{medium}, {scheme}");
            assert!(found["texts"].as_u64().unwrap() > 40, "{found}");
        }
        backs.insert(browser.text("getComputedStyle(document.body).backgroundColor"));
    }
    assert_eq!(backs.len(), 3, "light, dark and paper differ: {backs:?}");
}

/// The tags of a page with the names of their attributes, without the bodies of its style and script.
fn tags(html: &str) -> Vec<String> {
    let own = [
        include_str!("../../src/frontend/seeing/page.css"),
        include_str!("../../src/frontend/seeing/page.js"),
    ];
    let html = own.iter().fold(html.to_owned(), |html, own| {
        assert_eq!(html.matches(own).count(), 1);
        html.replace(own, "")
    });
    let mut tags = Vec::new();
    for after in html.split('<').skip(1) {
        let mut tag = String::new();
        let mut is_quoted = false;
        let mut is_closed = false;
        for next in after.chars() {
            match next {
                '"' => is_quoted = !is_quoted,
                '>' if !is_quoted => {
                    is_closed = true;
                    break;
                }
                next if !is_quoted => tag.push(next),
                _ => {}
            }
        }
        assert!(is_closed, "<{after}");
        tags.push(tag);
    }
    tags
}

fn unescaped(html: &str) -> String {
    html.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&amp;", "&")
}

/// A dump with names, comments, conditions and destinations of others: a chain that is led to, one below it, and
/// mistakes in both.
fn foreign_dump([chain, below, comment]: [&str; 3], every: u32) -> String {
    let comment = comment.replace('\\', "\\\\").replace('"', "\\\"");
    let comment = format!(
        "-m comment --comment \"{comment}\" -m string --string \"{comment}\" --algo bm --to 65535"
    );
    let statistic = format!("-m statistic --mode nth --every {every} --packet 0");
    format!(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:{chain} - [0:0]\n:{below} - [0:0]\n\
         -A PREROUTING -p tcp -m tcp --dport 80 {comment} -j {chain}\n\
         -A {chain} -p tcp {comment} {statistic} -j {below}\n\
         -A {chain} -p tcp {comment} {statistic} -j DNAT --to-destination 10.0.0.1{chain}\n\
         -A {below} -p tcp {comment} {statistic} -j DNAT --to-destination 10.0.0.2\n\
         -A {below} -p tcp {comment} {statistic} -j DNAT --to-destination 10.0.0.3\nCOMMIT\n"
    )
}

const HOSTILE: [&str; 4] = [
    "<script>alert(1)</script>",
    "\"><img/src=x/onerror=\"x",
    "'onfocus='x&lt;&#60;",
    "</style></code><!--",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The same dump with letters in the place of everything that means something in HTML has the same tags.
    #[test]
    fn text_of_others_adds_no_tag_and_no_attribute(
        chain in prop_oneof![3 => "[a-z<>&\"'/=;!#]{1,26}", 1 => prop::sample::select(&HOSTILE[..]).prop_map(str::to_owned)],
        below in "[a-z<>&\"'/=;!#]{1,26}",
        comment in prop_oneof![3 => "[a-zA-Z <>&\"'/=;!#]{1,60}", 1 => prop::sample::select(&HOSTILE[..]).prop_map(str::to_owned)],
        every in 2..5_u32,
    ) {
        // Iptables refuses names with `!` in front; the words of a dump are separated by quotes too.
        let chain = format!("c{}", chain.replace('"', ""));
        let below = format!("d{}", below.replace('"', ""));
        let html = page_of(&foreign_dump([&chain, &below, &comment], every));
        let harmless = |text: &str| text.replace(|next: char| !next.is_ascii_alphabetic() && next != ' ', "x");
        let plain = page_of(&foreign_dump([&harmless(&chain), &harmless(&below), &harmless(&comment)], every));
        prop_assert_eq!(tags(&html), tags(&plain));
        let text = unescaped(&html);
        for shown in [&chain, &below, &format!("10.0.0.1{chain}")] {
            prop_assert!(text.contains(&format!(">{shown}<")), "{} is not in {}", shown, text);
        }
        // The string is a condition of the shares: it stands beside the name too.
        prop_assert!(html.contains("connections with <code>-p tcp --string "), "{}", html);
    }
}

#[test]
fn text_of_others_is_shown_as_it_is_and_never_run() {
    let mut browser = Browser::start();
    for hostile in HOSTILE {
        let name = format!("c{}", hostile.replace('"', ""));
        browser.open(&page_of(&foreign_dump([&name, "below", hostile], 3)));
        assert_eq!(
            browser.text("document.querySelector('h2 .name').textContent"),
            name
        );
        assert_eq!(
            browser.value("document.querySelectorAll('script').length"),
            1
        );
        assert_eq!(
            browser.value("document.querySelectorAll('img, [onerror], [onfocus]').length"),
            0
        );
        let rule = browser.text("document.querySelector('.step code').textContent");
        assert!(rule.contains(&hostile.replace('"', "\\\"")), "{rule}");
        let events = browser.events.iter();
        let dialogs = events.filter(|event| event["method"] == "Page.javascriptDialogOpening");
        assert_eq!(dialogs.count(), 0);
    }
    // If a tag slipped through all the same, the policy of the page would not run it.
    let html = recorded("tutorial-nth.txt").replace(
        "<main",
        "<script>document.title = 'run'</script><img src=\"file:///x\" onerror=\"document.title = 'run'\"><main",
    );
    browser.open(&html);
    browser.value("new Promise((done) => setTimeout(done, 100))");
    assert_eq!(browser.text("document.title"), "Who gets which connections");
}

/// The picture is made by `examples/explain.sh`, from the recorded dump of a tutorial.
#[test]
fn the_readme_shows_the_picture_of_a_recorded_chain() {
    let of = |name: &str| std::fs::read_to_string(Path::new(ROOT).join(name)).unwrap();
    assert!(of("examples/explain.sh").contains("tests/explained/tutorial-nth.txt"));
    let readme = of("README.md");
    let picture = readme
        .lines()
        .find_map(|line| line.strip_suffix("](examples/explain.png)"));
    let figures = picture
        .unwrap()
        .split(' ')
        .filter(|word| word.contains('.'));
    let explained = of("tests/explained/tutorial-nth.explained");
    let mut found = 0;
    for figure in figures {
        assert!(explained.contains(&format!("{figure} %")), "{figure}");
        found += 1;
    }
    assert_eq!(found, 2);
    let png = std::fs::read(Path::new(ROOT).join("examples/explain.png")).unwrap();
    assert!(png.starts_with(b"\x89PNG") && png.len() < 150_000);
}
