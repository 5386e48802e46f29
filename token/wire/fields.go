package wire

import "p11-agent/pinentry/secret"

// requests makes an empty message for each type of request.
var requests = map[Type]func() Message{
	TypeHello:    func() Message { return new(Hello) },
	TypeSlots:    func() Message { return new(Slots) },
	TypeObjects:  func() Message { return new(Objects) },
	TypeToken:    func() Message { return new(Token) },
	TypeLogin:    func() Message { return new(Login) },
	TypeLogout:   func() Message { return new(Token) },
	TypeOperate:  func() Message { return new(Operate) },
	TypeCancel:   func() Message { return new(Cancel) },
	TypeGenerate: func() Message { return new(Generate) },
	TypeNewToken: func() Message { return new(NewToken) },
}

func (m *Hello) fields(c *codec) {
	c.uint32(&m.Version)
	c.raw(&m.Path)
	c.raw(&m.InitArgs)
	c.bool(&m.Poll)
	c.bool(&m.Unconfined)
	list(c, &m.Write, func(path *string, c *codec) { c.raw(path) })
}

func (m *HelloReply) fields(c *codec) {
	c.uint32(&m.Version)
	c.text(&m.Manufacturer)
	c.text(&m.Description)
	c.uint32(&m.Library)
	c.uint32(&m.Cryptoki)
	c.bool(&m.Waits)
	m.Sandbox.fields(c)
}

func (s *Sandbox) fields(c *codec) {
	c.bool(&s.Off)
	c.uint32(&s.Files)
	c.text(&s.FilesError)
	list(c, &s.Missing, func(path *string, c *codec) { c.raw(path) })
	c.bool(&s.Scoped)
	c.bool(&s.Calls)
	c.text(&s.CallsError)
}

func (m *Slots) fields(c *codec) {
	c.bool(&m.Reinitialize)
}

func (m *Event) fields(c *codec) {
	list(c, &m.Gone, (*SlotID).fields)
}

func (m *SlotID) fields(c *codec) {
	c.uint64(&m.ID)
}

func (m *SlotsReply) fields(c *codec) {
	list(c, &m.Slots, (*Slot).fields)
	c.bool(&m.PCSC)
}

func (m *Slot) fields(c *codec) {
	c.uint64(&m.ID)
	c.text(&m.Description)
	c.text(&m.Manufacturer)
	c.uint64(&m.Flags)
	c.bool(&m.HasToken)
	m.Token.fields(c)
	m.Info.fields(c)
	list(c, &m.Mechanisms, (*Mechanism).fields)
}

func (m *TokenID) fields(c *codec) {
	c.text(&m.Label)
	c.text(&m.Manufacturer)
	c.text(&m.Model)
	c.text(&m.Serial)
	c.uint32(&m.Twin)
}

func (m *TokenInfo) fields(c *codec) {
	c.uint64(&m.Flags)
	c.uint64(&m.MaxSessions)
	c.uint64(&m.MinPIN)
	c.uint64(&m.MaxPIN)
	c.bool(&m.LoggedIn)
	c.uint64(&m.Stay)
}

func (m *Mechanism) fields(c *codec) {
	c.uint64(&m.Type)
	c.uint64(&m.MinKey)
	c.uint64(&m.MaxKey)
	c.uint64(&m.Flags)
}

func (m *Objects) fields(c *codec) {
	m.Token.fields(c)
	c.uint64(&m.Slot)
	c.bool(&m.Placed)
	c.bool(&m.Peek)
	list(c, &m.Named, (*ObjectName).fields)
}

func (m *ObjectName) fields(c *codec) {
	c.bytes(&m.ID)
	c.text(&m.Label)
}

func (m *ObjectsPart) fields(c *codec) {
	c.bool(&m.First)
	list(c, &m.Objects, (*Object).fields)
}

func (m *ObjectsReply) fields(c *codec) {
	m.Info.fields(c)
	list(c, &m.Objects, (*Object).fields)
	c.bool(&m.Cut)
	c.uint32(&m.Long)
}

func (m *Object) fields(c *codec) {
	c.uint64(&m.Class)
	c.bytes(&m.ID)
	c.text(&m.Label)
	c.uint64(&m.KeyType)
	c.bytes(&m.Modulus)
	c.bytes(&m.Exponent)
	c.bytes(&m.ECParams)
	c.bytes(&m.ECPoint)
	c.bytes(&m.Value)
	c.tri(&m.Sign)
	c.tri(&m.Decrypt)
	c.tri(&m.Derive)
	c.tri(&m.Private)
	c.tri(&m.AlwaysAuth)
	c.tri(&m.Trusted)
	c.uint64(&m.CertCategory)
}

func (m *Token) fields(c *codec) {
	m.Token.fields(c)
}

func (m *TokenReply) fields(c *codec) {
	m.Info.fields(c)
}

func (m *Login) fields(c *codec) {
	m.Token.fields(c)
	c.uint64(&m.Stay)
	c.bool(&m.LastTry)
	c.bool(&m.Pad)
	c.secret(&m.PIN)
}

func (m *Login) pin() *secret.Secret { return m.PIN }

func (m *Operate) fields(c *codec) {
	m.Key.fields(c)
	c.byte((*byte)(&m.Function))
	if m.Function > lastFunction {
		c.fail("function that is not known")
	}
	c.uint64(&m.Mechanism)
	m.Params.fields(c)
	c.uint32(&m.ResultLen)
	c.bytes(&m.Data)
	c.bool(&m.ContextLogin)
	c.uint64(&m.Stay)
	c.bool(&m.LastTry)
	c.bool(&m.Pad)
	c.secret(&m.PIN)
}

func (m *Operate) pin() *secret.Secret { return m.PIN }

func (m *Params) fields(c *codec) {
	c.uint64(&m.Hash)
	c.uint64(&m.MGF)
	c.uint64(&m.Salt)
	c.bytes(&m.Source)
}

func (m *KeyID) fields(c *codec) {
	m.Token.fields(c)
	c.bytes(&m.ID)
	c.text(&m.Label)
	c.uint64(&m.KeyType)
	c.bytes(&m.Modulus)
	c.bytes(&m.ECPoint)
	c.bool(&m.Any)
}

func (m *OperateReply) fields(c *codec) {
	c.bytes(&m.Result)
}

func (m *Generate) fields(c *codec) {
	m.Token.fields(c)
	c.uint64(&m.Mechanism)
	c.uint32(&m.Bits)
	list(c, &m.ECParams, func(v *Value, c *codec) { c.bytes(&v.Bytes) })
	c.bytes(&m.ID)
	c.text(&m.Label)
	c.bool(&m.Check)
}

func (m *GenerateReply) fields(c *codec) {
	m.Public.fields(c)
	m.Private.fields(c)
	c.tri(&m.AlwaysSensitive)
	c.tri(&m.NeverExtractable)
	c.tri(&m.Local)
}

func (m *NewToken) fields(c *codec) {
	c.text(&m.Label)
	c.secret(&m.PIN)
}

func (m *NewToken) pin() *secret.Secret { return m.PIN }

func (m *NewTokenReply) fields(c *codec) {
	m.Token.fields(c)
}

func (m *Cancel) fields(c *codec) {
	c.uint32(&m.Request)
}

func (e *Error) fields(c *codec) {
	c.text(&e.Function)
	c.uint64(&e.RV)
	c.uint32((*uint32)(&e.Reason))
	if e.Reason > lastReason {
		c.fail("reason that is not known")
	}
	c.text(&e.Text)
	c.bool(&e.HasInfo)
	e.Info.fields(c)
}
