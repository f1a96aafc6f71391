"""Secrets do not reach what people read: masked by pattern within texts, and whole where the attribute says so."""

import orjson
import pytest
from cpu_time import least_cpu_s
from hypothesis import given
from hypothesis import strategies as st

from streamer.redaction import MASK, MAX_TEXT, Redactor, mask_text, names_a_secret

S = "hunter2Xy!"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\nq2x\n-----END RSA PRIVATE KEY-----"

TEXTS = [
    (f"mysqldump -u root -p{S} shop", S),
    (f"mysql --host db -p{S}", S),
    (f"psql --password={S} -h db", S),
    (f"tool --password {S} --verbose", S),
    (f'tool --password "two {S} words" -v', S),
    (f"wmic /node:h /user:a /password:{S} process", S),
    (f"schtasks /create /ru bob /rp {S} /tn x", S),
    (f"plink -pw {S} host", S),
    (f"cmdkey /add:h /user:u /pass:{S}", S),
    (f"xfreerdp /u:bob /p:{S} /v:h", S),
    (f"sshpass -p {S} ssh root@h", S),
    (f"PsExec.exe \\\\h -u bob -p {S} cmd".replace("PsExec", "psexec"), S),
    (f"docker login -u bob -p {S} registry", S),
    (f"sqlcmd -S db -U sa -P {S} -Q x", S),
    (f"ldapsearch -x -D cn=admin -w {S} -b dc=x", S),
    (f"curl -s -u bob:{S} https://h/", S),
    (f"net user bob {S} /add", S),
    (f"net.exe use Z: \\\\h\\share {S} /user:bob", S),
    (f"net use \\\\h\\share /user:corp\\bob {S}", S),
    (f"ConvertTo-SecureString '{S}' -AsPlainText -Force", S),
    (f"openssl rsa -passin pass:{S} -in k", S),
    (f"DB_PASSWORD={S} ./run", S),
    (f"export AWS_SECRET_ACCESS_KEY={AWS_SECRET}", AWS_SECRET),
    (f"key is {AWS_SECRET} ok", AWS_SECRET),
    (f'{{"password":"{S}","user":"bob"}}', S),
    (f'{{\\"password\\": \\"{S}\\"}}', S),
    (f"user=bob;pwd={S};server=db", S),
    (f"https://h/?api_key={S}&page=2", S),
    (f"https://blob/x?sv=1&sig={S}&se=2", S),
    (f"postgres://bob:{S}@db:5432/x", S),
    (f"amqp://bob:p@{S}@mq/", S),
    ("git clone https://abcdefghijklmnopqrstuvwxyz@h/x", "abcdefghijklmnopqrstuvwxyz"),
    ("id AKIAIOSFODNN7EXAMPLE used", "IOSFODNN7EXAMPLE"),
    ("IQoJb3JpZ2luX2VjEJr//////////wEaCXVzLWVhc3Q", "X2VjEJr"),
    (f"Authorization: Bearer {JWT}", JWT),
    ("authorization: token abcdef123456", "abcdef123456"),
    ("-H 'Authorization: Basic Ym9iOmh1bnRlcjI='", "Ym9iOmh1bnRlcjI"),
    ("bearer abcdefghijklmnopqrstu", "abcdefghijklmnopqrstu"),
    (f"cookie jwt {JWT} end", JWT[:40]),
    (f"echo '{PEM}' > k", "MIIEpAIBAAKCAQEA7"),
    (PEM[:60], "MIIEpAIBAAKC"),
    ("push ghp_abcdefghijklmnopqrstuvwxyz0123456789 now", "abcdefghijklmnopqrstuvwxyz"),
    ("slack xoxb-123456789012-abcdefghijkl", "abcdefghijkl"),
    ("key=AIzaSyA1234567890abcdefghijklmnopqrstu", "SyA1234567890"),
    ("google AIzaSyA1234567890abcdefghijklmnopqrstu", "SyA1234567890"),
    ("stripe " + "sk_" + "live_abcdefghijklmnop1234", "abcdefghijklmnop"),
    ("vault hvs.CAESIJabcdefghijklmnop", "CAESIJ"),
]
ORDINARY = [
    "C:\\Windows\\System32\\svchost.exe -k netsvcs -p -s Schedule",
    "winword.exe /n C:\\Users\\bob\\report.docx",
    "ssh -p 2222 bob@host",
    "docker run -p 8080:80 nginx",
    "mkdir -p /var/lib/x",
    "net user bob /domain",
    "net use",
    "mysql -p",
    "https://example.com:8443/path?q=a@b",
    "Basic authentication is off",
    "arn:aws:secretsmanager:us-east-1:123456789012:secret:db-x",
    "da39a3ee5e6b4b0d3255bfef95601890afd80709",
    "PWD=/home/bob",
    "/Library/Application1/Support/CloudDocs2/session",
    "Elevated Token:\t\tNo",
    '{"AwsIamAccessKey": {"PrincipalId": "x"}}',
    "HKLM\\SystemCertificates\\Certificates\\B51C067CEE2B0C3DF855AB2D92F4FE39D4E70F0E\\Blob",
]


@pytest.mark.parametrize(("text", "secret"), TEXTS)
def test_secrets_within_texts_are_masked(text: str, secret: str) -> None:
    shown = mask_text(text)
    assert secret not in shown
    assert MASK in shown


def test_what_surrounds_a_secret_stays() -> None:
    assert mask_text(f"mysqldump -u root -p{S} shop") == f"mysqldump -u root -p{MASK} shop"
    assert mask_text(f"postgres://bob:{S}@db:5432/x") == f"postgres://bob:{MASK}@db:5432/x"
    assert mask_text(f"user=bob;pwd={S};server=db") == f"user=bob;pwd={MASK};server=db"
    assert mask_text("id AKIAIOSFODNN7EXAMPLE used") == f"id AKIA{MASK} used"


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_are_left_alone(text: str) -> None:
    assert mask_text(text) == text


@given(st.one_of(st.text(), st.sampled_from([text for text, _ in TEXTS])))
def test_masking_twice_is_masking_once(text: str) -> None:
    once = mask_text(text)
    assert mask_text(once) == once


def test_names_that_say_secret() -> None:
    for name in ("password", "DB_PASSWORD", "accessToken", "X-Api-Key", "Set-Cookie", "client_secret"):
        assert names_a_secret(name), name
    for name in ("name", "password_last_set", "token_count", "secretId", "port", "monkey"):
        assert not names_a_secret(name), name


def test_attributes_named_as_secrets_are_masked_whole() -> None:
    record = {
        "api": {"token": {"value": S}, "request": {"data": {"newPassword": S, "hasPassword": True}}},
        "http_headers": [{"name": "Authorization", "value": S}, {"name": "Accept", "value": "text/html"}],
    }
    shown = Redactor().record(record).record
    assert S not in str(shown)
    assert shown["http_headers"][1] == {"name": "Accept", "value": "text/html"}
    assert shown["api"]["token"] == MASK


def test_listed_attributes_are_masked_whole_and_remembered() -> None:
    redactor = Redactor(["actor.user", "resources[].owner"])
    record = {"actor": {"user": {"name": "Alice"}, "app": "x"}, "resources": [{"owner": "bob", "uid": "r1"}]}
    redacted = redactor.record(record)
    assert redacted.record == {"actor": {"user": MASK, "app": "x"}, "resources": [{"owner": MASK, "uid": "r1"}]}
    assert redacted.hidden == {"alice", "bob"}
    assert redactor.text("actor.user.name", "Alice") == MASK
    assert redactor.text("resources[].owner", "bob") == MASK
    assert redactor.text("actor.app", "x") == "x"
    assert redactor.text("actor.app", "") == ""


def test_an_event_is_not_changed_by_looking_at_it() -> None:
    record = {"process": {"cmd_line": f"mysql -p{S}"}, "list": [{"password": S}]}
    before = orjson.dumps(record)
    Redactor().record(record)
    assert orjson.dumps(record) == before


def test_hostile_events_are_cut_to_size() -> None:
    record = {
        "long": "a" * 100_000,
        "many": {str(i): i for i in range(10_000)},
        "list": list(range(5000)),
        "texts": ["x=" * 3000] * 50,
    }
    deep: dict[str, object] = record
    for _ in range(200):
        deep["deep"] = deep = {}
    redacted = Redactor().record(record)
    assert redacted.cut
    assert len(orjson.dumps(redacted.record)) < 600_000
    assert len(redacted.record["long"]) <= MAX_TEXT


@pytest.mark.parametrize(
    "text",
    [
        "a.a-",
        "password",
        "curl -u ",
        "://",
        '"',
        "password='",
        "net use ",
        "eyJ",
        "-----BEGIN PRIVATE KEY",
        "Aa1",
        "mysql -",
        "token=\\\"'",
    ],
)
def test_the_cost_of_masking_grows_with_the_length_of_the_text(text: str) -> None:
    whole, quarter = (text * (length // len(text)) for length in (MAX_TEXT, MAX_TEXT // 4))
    ratio = least_cpu_s(lambda: mask_text(whole), 9) / least_cpu_s(lambda: mask_text(quarter), 9)
    assert ratio < 8, "four times the text; sixteen times the cost if each place looked at all others"


def test_of_an_event_that_is_not_at_hand_no_name_is_shown_where_attributes_are_listed() -> None:
    assert Redactor(["actor.user.name"]).record({}).entity("user:eve") == f"user:{MASK}"
    assert Redactor().record({}).entity("user:eve") == "user:eve"
