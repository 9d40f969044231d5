"""Masks: the published vectors of what they are made of, and their byte layout."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from homespun.errors import BadRoster
from homespun.secagg.masks import (
    apply_masks,
    hkdf,
    key_agreement,
    opposite,
    pair_key,
    pairwise_mask,
    self_mask,
)
from homespun.secagg.transcript import is_signed
from homespun.tensors.packing import word

T = bytes(range(32))
KEY = bytes(range(100, 132))


def x25519(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(secret)


@pytest.mark.parametrize(
    ("secret", "public", "shared"),
    [
        (  # RFC 7748, section 5.2
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
        (  # RFC 7748, section 6.1: Bob's secret, Alice's public key
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
            "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
            "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
        ),
        (  # ours
            "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
            "358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254",
            "9663aa1da97e848a914a436d04163dfbb89178f107f1b5b77ed3854203382854",
        ),
    ],
)
def test_key_agreement(secret, public, shared):
    agreed = key_agreement(x25519(bytes.fromhex(secret)), bytes.fromhex(public), 1)
    assert agreed.hex() == shared


@pytest.mark.parametrize("public", [bytes(32), b"\1" + bytes(31), bytes(31)], ids=len)
def test_keys_that_agree_with_everybody_are_refused(public):
    with pytest.raises(BadRoster):
        key_agreement(x25519(KEY), public, 3)


@pytest.mark.parametrize(
    ("secret", "public", "message", "signature"),
    [
        (  # RFC 8032, section 7.1
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            (
                "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e3970"
                "1cf9b46bd25bf5f0595bbe24655141438e7a100b"
            ),
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            (
                "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613"
                "d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
            ),
        ),
    ],
)
def test_signatures(secret, public, message, signature):
    signed = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)).sign(
        bytes.fromhex(message)
    )
    assert signed.hex() == signature
    assert is_signed(bytes.fromhex(public), signed, bytes.fromhex(message))
    assert not is_signed(bytes.fromhex(public), signed, b"something else")
    assert not is_signed(bytes(31), signed, b"")


@pytest.mark.parametrize(
    ("secret", "salt", "info", "output"),
    [
        (  # RFC 5869, appendix A
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(0x50)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            (
                "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c6"
                "5e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87"
            ),
        ),
        (
            b"\x0b" * 22,
            b"",
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_key_derivation(secret, salt, info, output):
    assert hkdf(secret, salt, info, len(output) // 2).hex() == output


def test_a_pair_key_is_the_same_for_both():
    low, high = b"\1\0\0\0", b"\0\1\0\0"
    expected = hkdf(b"secret", T, b"label" + low + high)
    assert pair_key(b"secret", T, b"label", 1, 256) == expected
    assert pair_key(b"secret", T, b"label", 256, 1) == expected


def test_a_pair_key_depends_on_everything():
    keys = {
        pair_key(secret, transcript, label, 1, other)
        for secret in (b"a" * 32, b"b" * 32)
        for transcript in (T, bytes(32))
        for label in (b"x", b"y")
        for other in (2, 3)
    }
    assert len(keys) == 16


# --- the keystream ------------------------------------------------------------------------------------


def keystream(key: bytes, size: int) -> bytes:
    return Cipher(algorithms.AES(key[:16]), modes.CTR(key[16:])).encryptor().update(bytes(size))


def test_the_first_block_is_aes_of_the_counter():
    main, aux = np.zeros(0, "<u2"), np.zeros(2, "<u8")
    apply_masks(main, aux, [(bytes(32), True)])
    assert aux.tobytes().hex() == "66e94bd4ef8a2c3b884cfa59ca342b2e"


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("num_aux", [0, 1, 2, 3, 40000])
@pytest.mark.parametrize("dimension", [0, 1, 7, 200_001])
def test_the_layout(bits, num_aux, dimension):
    """Auxiliary words first, main words from the next whole block on; across many segments."""
    main, aux = np.zeros(dimension, word(bits)), np.zeros(num_aux, "<u8")
    apply_masks(main, aux, [(KEY, True)])
    start = -(-aux.nbytes // 16) * 16
    stream = keystream(KEY, start + main.nbytes)
    assert aux.tobytes() == stream[: aux.nbytes]
    assert main.tobytes() == stream[start:]


def test_many_masks_wrap_around_and_cancel():
    main, aux = np.arange(70_000, dtype="<u2"), np.arange(3, dtype="<u8") - 2
    plain = main.copy(), aux.copy()
    masks = [(bytes([i]) * 32, i % 3 == 0) for i in range(150)]
    apply_masks(main, aux, masks)
    expected = plain[0].astype(object)
    for key, added in masks:
        mask = np.frombuffer(keystream(key, 32 + main.nbytes)[32:], "<u2").astype(object)
        expected += mask if added else -mask
    assert (main == expected % 2**16).all()
    apply_masks(main, aux, map(opposite, reversed(masks)))
    assert (main == plain[0]).all()
    assert (aux == plain[1]).all()


@pytest.mark.parametrize(("bits", "dtype"), [(1, "<u2"), (16, "<u2"), (17, "<u4"), (32, "<u4")])
def test_words(bits, dtype):
    assert word(bits) == dtype


def test_neighbours_masks_cancel_under_one_transcript_only():
    one, two = x25519(KEY), x25519(T)
    public = [secret.public_key().public_bytes_raw() for secret in (one, two)]
    mine = pairwise_mask(one, public[1], T, 4, 9)
    assert mine == opposite(pairwise_mask(two, public[0], T, 9, 4))
    assert mine[1]  # the lower index adds
    assert mine[0] != pairwise_mask(two, public[0], bytes(32), 9, 4)[0]


def test_a_self_mask_is_added_and_the_devices_own():
    assert self_mask(KEY, T, 4)[1]
    assert self_mask(KEY, T, 4) != self_mask(KEY, T, 5)
