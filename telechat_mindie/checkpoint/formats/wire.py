"""Protobuf's wire format, as far as MindSpore's files need it: fields read one by one, and encoded."""

from __future__ import annotations

from collections.abc import Iterator

from telechat_mindie.checkpoint.formats.bounds import MAX_NAME_LENGTH, BoundedFile
from telechat_mindie.errors import CheckpointError

VARINT, LENGTH_DELIMITED = 0, 2
_VARINT_BYTES = 10  # at most, for 64 bits
_FIXED_BYTES = {1: 8, 5: 4}  # by wire type


class Message:
    """The bytes [position, end) of a file as a protobuf message, read field by field.

    Args:
        kind: what the file should be, for messages.
    """

    def __init__(self, file: BoundedFile, position: int, end: int, kind: str) -> None:
        self.file = file
        self.position = position
        self._end = end
        self._kind = kind

    def is_read(self) -> bool:
        return self.position == self._end

    def field(self) -> tuple[int, int]:
        """Number and wire type of the next field."""
        key = self.varint()
        return key >> 3, key & 7

    def expect_field(self, number: int) -> None:
        if self.field() != (number, LENGTH_DELIMITED):
            raise self.broken("an unknown field")

    def varint(self) -> int:
        value = 0
        encoded = self.file.read(self.position, min(_VARINT_BYTES, self._end - self.position))
        for shift, byte in enumerate(encoded):
            self.position += 1
            value |= (byte & 0x7F) << 7 * shift
            if byte < 0x80 and value < 2**64:
                return value
        if len(encoded) < _VARINT_BYTES:
            raise self.broken("a message that ends too early")
        raise self.broken("a number of more than 64 bits")

    def signed(self) -> int:
        """An int32 or int64: negative ones are stored as 64 bits in two's complement."""
        value = self.varint()
        return value - 2**64 if value >= 2**63 else value

    def integers(self, wire: int) -> Iterator[int]:
        """The numbers of a repeated integer field: one, or several where the writer packed them."""
        if wire == VARINT:
            yield self.signed()
            return
        packed = self.submessage()
        while not packed.is_read():
            yield packed.signed()

    def skip(self) -> tuple[int, int]:
        """Offset and length of a length-delimited field, passed over unread."""
        length = self.varint()
        begin = self.position
        if begin + length > self._end:
            raise self.broken(f"a field of {length} bytes that reaches beyond its message")
        self.position += length
        return begin, length

    def skip_field(self, wire: int) -> None:
        """Pass over a field that a newer writer may have added."""
        if wire == VARINT:
            self.varint()
        elif wire == LENGTH_DELIMITED:
            self.skip()
        elif wire in _FIXED_BYTES and self.position + _FIXED_BYTES[wire] <= self._end:
            self.position += _FIXED_BYTES[wire]
        else:
            raise self.broken("an unknown field")

    def submessage(self) -> Message:
        begin, length = self.skip()
        return Message(self.file, begin, begin + length, self._kind)

    def text(self) -> str:
        begin, length = self.skip()
        if length > 4 * MAX_NAME_LENGTH:
            raise self.broken(f"a name of {length} bytes")
        try:
            return self.file.read(begin, length).decode()
        except UnicodeDecodeError:
            raise self.broken("a name that is not UTF-8") from None

    def broken(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"is not a well-formed {self._kind}",
            where=self.file.path,
            found=f"{found} before byte {self.position}",
            advice="The file is truncated, damaged or of another format; download or save it again.",
        )


def encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def encode_field(number: int, content: bytes, following: int = 0) -> bytes:
    """A length-delimited field of `content` and `following` more bytes, which are not here yet."""
    return bytes([number << 3 | LENGTH_DELIMITED]) + encode_varint(len(content) + following) + content
