"""Evidences and observables have the shapes and the types that OCSF publishes."""

from alert_samples import SCHEMA, VALIDATOR, one
from hypothesis import given
from hypothesis import strategies as st

from streamer.alerting.observables import EVIDENCE, OBSERVABLE_TYPES, Leaf, Shape, evidence, observables


def test_shapes_and_observable_types_are_those_of_the_schema() -> None:
    captions = SCHEMA["objects"]["observable"]["attributes"]["type_id"]["enum"]
    types = SCHEMA["dictionary"]["types"]["attributes"]
    published = VALIDATOR.schema["$defs"]
    kinds = {"string": str, "integer": int, "boolean": bool}
    assert {uid: captions[str(uid)]["caption"] for uid in OBSERVABLE_TYPES} == OBSERVABLE_TYPES

    def walk(name: str, shape: Shape) -> None:
        theirs, known = published[name.replace("/", "_")], SCHEMA["objects"][name]["attributes"]
        assert set(theirs.get("required", ())) == set(shape.required), name
        if name != "evidences":
            allowed = {choice for option in theirs.get("anyOf", ()) for choice in option["required"]}
            assert set(shape.one_of) <= allowed and bool(shape.one_of) == bool(allowed), name
        for attribute, wanted in shape.attributes.items():
            where, own = f"{name}.{attribute}", known[attribute]
            schema = theirs["properties"][attribute]
            if isinstance(wanted, Leaf):
                assert kinds[schema["type"]] is wanted.kind, where
                assert set(schema.get("enum", ())) == wanted.allowed, where
                observable = own.get("observable") or types.get(own["type"], {}).get("observable") or 0
                assert observable == wanted.observable, where
            else:
                assert isinstance(wanted, list) == (schema.get("type") == "array"), where
                walk(own["object_type"], wanted if isinstance(wanted, Shape) else wanted[0])

    walk("evidences", EVIDENCE)


@given(
    st.ip_addresses().map(str) | st.from_regex(r"[0-9a-f:.]{1,45}", fullmatch=True), st.emails() | st.text(max_size=9)
)
def test_addresses_are_kept_where_the_schema_knows_them_as_such(ip: str, email: str) -> None:
    one({"src_endpoint": {"ip": ip, "mac": ip}, "user": {"name": "x", "email_addr": email}, "device": {"ip": ip}})


def test_a_name_where_an_address_belongs_stays_a_name() -> None:
    assert evidence({"src_endpoint": {"ip": "AWS Internal"}})["src_endpoint"] == {"name": "AWS Internal"}
    assert evidence({"src_endpoint": {"ip": "fe80::1%eth0", "port": 70000}})["src_endpoint"] == {"ip": "fe80::1"}


def test_evidence_keeps_nothing_that_is_not_evidence() -> None:
    assert evidence({"actor": "bob", "device": {"hostname": 7}, "process": {"name": "no id"}, "file": {"size": 1}}) == {
        "device": {"hostname": "7", "type_id": 0}
    }
    assert evidence({"module": {"file": {"path": "/lib/x.so"}}})["file"]["name"] == "x.so"
    assert observables({"actor": {"user": {"name": "-"}}}, "e") == []
